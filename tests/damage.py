"""Ways in which the files of a checkpoint can be damaged."""

KINDS = (
  "truncated",
  "one bit flipped",
  "missing",
  "empty",
  "no permission",
  "directory without permission",
  "all missing",
  "manifest missing, truncated",
  "manifest broken",
)


def damage(directory, kind):
  """Damages the checkpoint in `directory`, and returns its largest file.

  Args:
    directory: directory of the checkpoint.
    kind: one of `KINDS`. If it damages one file of the checkpoint, this is the largest one.
  """
  files = [f for f in directory.rglob("*") if f.is_file() and f.name != "manifest.json"]
  largest = max(files, key=lambda f: f.stat().st_size)
  content = largest.read_bytes()
  middle = len(content) // 2
  match kind:
    case "truncated":
      largest.write_bytes(content[:middle])
    case "one bit flipped":
      largest.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    case "missing":
      largest.unlink()
    case "empty":
      largest.write_bytes(b"")
    case "no permission":
      largest.chmod(0)
    case "directory without permission":
      directory.chmod(0)
    case "all missing":
      for file in files:
        file.unlink()
    case "manifest missing, truncated":
      (directory / "manifest.json").unlink()
      largest.write_bytes(content[:middle])
    case "manifest broken":
      (directory / "manifest.json").write_text("{")
    case _:
      raise ValueError(f"unknown kind of damage: {kind!r}")
  return largest
