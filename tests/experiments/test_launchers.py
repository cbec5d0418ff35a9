"""The launchers and the README, as a user meets them: in processes of their own."""

import json
import os
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
from PIL import Image
import pytest

import tvq_haiku as tvq

import helpers
from launching import ROOT, place, run, start

assert place  # a fixture


@pytest.fixture(scope="module")
def quickstart(place):
  """The whole path of the quickstart, in small."""
  status, out, err = run(
    "python -m experiments.quickstart --smoke --workdir=runs/quickstart", place
  )
  assert status == 0, err
  return out, err


def test_quickstart_ends_with_the_table_and_what_it_wrote(quickstart):
  out, err = quickstart
  assert re.search(
    r"tvq_haiku +\d\.\d{3}\n +gzip -9 +\d\.\d{3}\n +bzip2 -9 +\d\.\d{3}\n +xz -9e", out
  )
  assert out.count("\n  [") == 3  # three passages
  assert "python -m experiments.sample --checkpoint=runs/quickstart" in out
  assert re.search(r"training \d+/\d+  \d\.\d{3} bits per byte  [\d,]+ tokens/s  \d+ s left", err)
  assert "Traceback" not in err and "checkpoint_manager" not in err


def test_quickstart_again_says_that_it_is_done(quickstart, place):
  status, out, err = run(
    "python -m experiments.quickstart --smoke --workdir=runs/quickstart", place
  )
  assert status == 0, err
  assert out.startswith(quickstart[0]) and "This run is done" in out and "--seed=1" in out


def test_quickstart_interrupted_saves_and_says_how_to_go_on(place):
  command = "python -m experiments.quickstart --smoke --seed=3 --workdir='a run'"
  process = start(command, place)
  while "training" not in process.stderr.readline():
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  assert re.search(
    r"Stopped after \d+ of \d+ updates and saved. To go on: " + re.escape(command), out
  )
  assert (place / "a run" / "checkpoints").is_dir()


def readme_blocks(language):
  return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def test_readme_python_runs():
  script = "".join(readme_blocks("python"))
  namespace = {}
  exec(compile(script, "README.md", "exec"), namespace)
  assert namespace["probabilities"].shape == (2, 100, 259)
  assert namespace["metrics"]["loss_lm"].shape == (2,)


def test_readme_commands_run(quickstart, place):
  commands = [
    part.strip()
    for block in readme_blocks("sh")
    for line in block.splitlines()
    for part in line.split("&&")
  ]
  assert commands[:2] == ["pip install -e '.[train]'", "python -m experiments.quickstart"]
  for command in commands:
    if command.startswith("pip install '.[test]'") or command.startswith("pytest"):
      continue  # that is how this test came to run
    if command.startswith("pip install -e '.[train]'"):
      assert "train =" in (ROOT / "setup.cfg").read_text()
      continue
    settings, command = re.match(r"((?:[A-Z_]+=\S+ )*)(.*)", command).groups()
    assert command.startswith("python -m experiments."), command
    if "quickstart" in command.split("--")[0]:
      command += " --smoke --workdir=runs/quickstart"
    if "experiments.text" in command:
      command += " --cache_dir=cache"
      if "--command" not in command:
        command += (
          " --config.n_max_step=8 --config.n_warmup_step=2 --config.d_model=32 --config.d_v=32"
        )
    environment = os.environ | dict(setting.split("=") for setting in settings.split())
    status, out, err = run(command, place, env=environment)
    assert status == 0 and out.strip(), (command, err)
  assert (place / "copy.md").read_bytes() == (ROOT / "README.md").read_bytes()


def test_readme_is_brief_where_it_must_be():
  lines = (ROOT / "README.md").read_text().splitlines()
  assert any(line.startswith("pip install") for line in lines[:25])
  assert len([line for line in readme_blocks("python")[0].splitlines() if line]) <= 15


def test_compile_time_benchmark_prints_a_table(place):
  status, out, err = run(
    "python -m experiments.benchmarks.compile_time --smoke --depths=1,2", place
  )
  assert status == 0, err
  assert re.search(r"1 +\d+\.\d\d +1\.00\n +2 +\d+\.\d\d +\d\.\d\d", out)


SAMPLE = "python -m experiments.sample --checkpoint=runs/quickstart"
# A model that has learned little may draw a document's end at any byte, but never finds it likeliest.
ENDLESS = SAMPLE + " --temperature=0 --length=1000000"


def test_a_stream_is_the_text(quickstart, place):
  flags = " --prompt='Anne ' --prompt=Bath --length=40 --top_k=50 --min_p=0.01 --stop=qqq"
  (status, plain, err), streamed = (
    run(SAMPLE + flags, place),
    run(SAMPLE + " --stream" + flags, place),
  )
  assert status == streamed[0] == 0, err + streamed[2]
  assert plain == streamed[1] and plain.startswith("Anne ") and not err + streamed[2]


def test_a_reader_that_goes_away_ends_a_stream_quietly(quickstart, place):
  process = start(ENDLESS + " --stream", place)
  process.stdout.read(1)
  process.stdout.close()
  assert process.wait(timeout=120) == 128 + signal.SIGPIPE
  with process.stderr as errors:
    assert not errors.read()


def test_a_conversation_survives_an_interrupted_reply(quickstart, place):
  process = start(ENDLESS + " --interactive", place, stdin=subprocess.PIPE)
  for prompt in ("Anne said", "Bath"):
    process.stdin.write(prompt + "\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # it writes
    process.send_signal(signal.SIGINT)
    process.stdout.readline()  # it has ended
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0 and not out + err, out + err


def test_interrupted_sampling_is_one_line(quickstart, place):
  process = start(ENDLESS + " --stream", place)
  process.stdout.read(1)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 130 and err == "sample: interrupted.\n"


def test_images_are_drawn(quickstart, place):
  status, out, err = run(SAMPLE + " --png=grids/grid.png --images=3 --image_size=4", place)
  assert status == 0 and "3 images of 4 x 4 pixels" in out, err
  with Image.open(place / "grids" / "grid.png") as page:
    assert page.size == (2 * 6 + 2, 2 * 6 + 2)


def test_a_checkpoint_of_another_vocabulary(place):
  config = helpers.tiny(n_layer=1)
  train_cfg = tvq.TrainConfig()
  state = tvq.init_train_state(config, train_cfg, jax.random.key(0))
  tvq.save_checkpoint(
    place / "other", tvq.Checkpoint(config, train_cfg, state, jax.random.key(0), 0)
  )
  for command in ("sample", "evaluate --file=README.md", "compress README.md --output=x"):
    status, out, err = run(f"python -m experiments.{command} --checkpoint=other", place)
    assert status == 1 and not out and "n_vocab=11, not the 259" in err, err
    assert len(err.splitlines()) == 1 and not (place / "x").exists()


def test_decode_benchmark_prints_its_bound(place):
  status, out, err = run(
    "python -m experiments.benchmarks.decode --smoke --batches=2 --positions=100 --json=decode.json",
    place,
  )
  assert status == 0 and len(out.splitlines()) == 3 and "of bound" in out, err
  rows = json.loads((place / "decode.json").read_text())["rows"]
  assert [row["position"] for row in rows] == [8, 100]
  row = rows[0]
  bound = (
    row["weight_mbytes"] / row["weight_gbytes_per_second"]
    + row["state_mbytes"] / row["state_gbytes_per_second"]
  ) / 1e3
  np.testing.assert_allclose(row["of_bound"], row["bound_seconds"] / row["seconds_per_step"])
  assert bound < row["bound_seconds"] < 1.1 * bound  # the rows that are written are a tenth at most


@pytest.mark.parametrize(
  "command, rows",
  [
    ("train_step --smoke --full --peer=dense --json=rows.json", 3),
    ("attention --smoke --reductions=scan --json=rows.json", 3),
  ],
)
def test_benchmarks_print_a_table_and_write_it(place, command, rows):
  status, out, err = run(f"python -m experiments.benchmarks.{command}", place)
  assert status == 0, err
  table = [line for line in out.splitlines() if re.match(r" *(32|64) ", line)]
  assert len(table) == rows and "of peak" in out
  written = json.loads((place / "rows.json").read_text())
  assert written["machine"]["backend"] == "cpu"
  for row in written["rows"]:
    assert row["tokens_per_second"] > 0 and row["temp_mbytes"] > 0 and row["compile_seconds"] > 0
    assert np.isclose(
      row["of_peak"], row["model_flops"] / row["seconds"] / row["peak_gflops"] / 1e9
    )


BAD = [
  ("quickstart --stepz=3", 2, "Unknown command line flag 'stepz'"),
  ("quickstart --seed=-1", 2, "seed"),
  ("quickstart now", 2, "unexpected argument 'now'"),
  ("quickstart --smoke --workdir=README.md/run", 1, "cannot write to the directory"),
  ("sample", 2, "--checkpoint"),
  ("sample --checkpoint=nowhere", 1, "nowhere holds no checkpoint: config.json is missing"),
  ("sample --checkpoint=nowhere --top_p=1.5", 2, "top_p"),
  ("sample --checkpoint=runs/quickstart --length=0", 2, "length"),
  ("sample --checkpoint=runs/quickstart --top_p=0", 2, "top_p"),
  ("sample --checkpoint=runs/quickstart --stream --png=x.png", 1, "exclude each other"),
  ("compress --checkpoint=runs/quickstart", 2, "FILE is missing"),
  ("compress --checkpoint=runs/quickstart empty.txt twice", 2, "unexpected argument 'twice'"),
  (
    "compress --checkpoint=runs/quickstart empty.txt --output=README.md",
    1,
    "README.md exists already",
  ),
  ("compress --checkpoint=runs/quickstart --decompress README.md", 1, "name the --output"),
  (
    "compress --checkpoint=runs/quickstart --decompress README.md --output=x",
    1,
    "README.md: this is not compressed data",
  ),
  ("evaluate --checkpoint=runs/quickstart --file=missing.txt", 1, "missing.txt"),
  ("evaluate --checkpoint=runs/quickstart --file=empty.txt", 1, "empty.txt is empty"),
  ("benchmarks.train_step --seq_lens=2k", 1, "--seq_lens: '2k' must be a whole number"),
  ("benchmarks.train_step --head_types=gqa", 1, "head_type='gqa': must be one of"),
  ("benchmarks.train_step --json=README.md/rows.json", 1, "README.md"),
  ("benchmarks.attention --reductions=sum --smoke", 1, "reduction='sum' must be one of"),
  ("benchmarks.compile_time --depths=0", 1, "n_layer=0: must be at least 1"),
]


@pytest.mark.parametrize("command, status, message", BAD)
def test_bad_input_is_one_line_and_a_status(quickstart, place, command, status, message):
  (place / "empty.txt").write_text("")
  before = sorted(str(p) for p in place.rglob("*"))
  got, out, err = run(f"python -m experiments.{command}", place)
  assert got == status, err
  assert message in err and len(err.strip().splitlines()) == 1, err
  assert not out and "Traceback" not in err
  assert sorted(str(p) for p in place.rglob("*")) == before


def test_damaged_checkpoint_is_one_line(quickstart, place):
  shutil.copytree(place / "runs" / "quickstart", place / "damaged")
  files = [file for file in (place / "damaged" / "checkpoints").rglob("*") if file.is_file()]
  largest = max(files, key=lambda file: file.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:1000])
  for command in ("sample --checkpoint=damaged", "quickstart --smoke --workdir=damaged"):
    status, out, err = run(f"python -m experiments.{command}", place)
    assert status == 1 and not out, err
    assert "damaged or incomplete" in err and len(err.strip().splitlines()) == 1, err


def test_run_of_another_seed_is_refused(quickstart, place):
  status, _, err = run(
    "python -m experiments.quickstart --smoke --workdir=runs/quickstart --seed=5", place
  )
  assert status == 1 and "a run of another seed than 5" in err, err


def test_run_of_another_configuration_is_refused(quickstart, place):
  config = place / "runs" / "quickstart" / "config.json"
  text = config.read_text()
  config.write_text(text.replace('"n_code": 16', '"n_code": 17'))
  status, _, err = run("python -m experiments.quickstart --smoke --workdir=runs/quickstart", place)
  config.write_text(text)
  assert status == 1 and "n_code=17 there, 16 now" in err, err
