"""The folder structure: imports point downwards, every module has a test file."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Folders and top-level modules, the lowest first: each imports only itself and earlier ones.
ORDER = (
  "types",
  "utils",
  "train_config",
  "config",
  "parallel",
  "ops",
  "attention",
  "model",
  "data",
  "training",
  "checkpoint",
  "generation",
  "evaluation",
  "language_model",
  "run",
  "__init__",
)
DATA_IMPORTS = {"types", "utils", "data"}  # a dataset can be prepared without any model code
MAX_TOP_LEVEL_MODULES = 8
MAX_LINES = 400

# Modules without a test file of their own -> the test file that covers them.
TESTED_ELSEWHERE = {
  # Steps of `vq_attention` and `full_attention`: only the final results have a reference.
  "attention/block_scores.py": "attention/test_vq.py",
  "attention/blocking.py": "attention/test_vq.py",
  "attention/blockwise.py": "attention/test_vq.py",
  "attention/key_values.py": "attention/test_vq_state.py",
  "attention/state.py": "attention/test_vq_state.py",
  "attention/tiled.py": "attention/test_full.py",
  "attention/vq_arguments.py": "attention/test_vq_state.py",
  # Decoding one token at a time is compared with the model that reads all tokens at once.
  "attention/decode.py": "generation/test_decoder.py",
  # The codebook changes only by an optimizer update.
  "model/quantizer.py": "training/test_train_step.py",
  # Padding must not change what the model computes for other tokens.
  "ops/padding.py": "model/test_documents.py",
  # Aliases have no behaviour; a type checker would test them.
  "types.py": "test_layout.py",
}


def paths_of(root):
  """Returns the path of every module of the package in `root`, by dotted name."""
  return {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((root / "tvq_haiku").rglob("*.py"))
  }


def imports_of(root):
  """Returns the modules of the package that each module imports, at any depth of its code."""
  paths = paths_of(root)
  return {
    module: {name for node in ast.walk(ast.parse(path.read_text())) for name in names(node, paths)}
    for module, path in paths.items()
  }


def names(node, paths):
  """Yields the modules of the package that an import statement names."""
  imported = []
  if isinstance(node, ast.Import):
    imported = [alias.name for alias in node.names]
  elif isinstance(node, ast.ImportFrom):
    assert node.level == 0, f"relative import in line {node.lineno}"
    imported = [f"{node.module}.{alias.name}" for alias in node.names]
  for name in imported:
    # The last part may be a function or a class: find the module that holds it.
    while name and name not in paths:
      name = name.rpartition(".")[0]
    if name:
      yield name


def folder_of(module):
  """Returns the folder or the top-level module that a dotted name belongs to."""
  return module.split(".")[1] if "." in module else "__init__"


def upward_imports(root):
  """Returns a description of each import from a folder that comes later in `ORDER`."""
  rank = {folder: i for i, folder in enumerate(ORDER)}
  return [
    f"{module} imports {name}"
    for module, imported in imports_of(root).items()
    for name in sorted(imported)
    if rank[folder_of(name)] > rank[folder_of(module)]
  ]


def check_no_cycle(root):
  """Raises a `CycleError` that names the modules if imports form a cycle."""
  graphlib.TopologicalSorter(imports_of(root)).prepare()


def test_order_lists_every_folder():
  assert {folder_of(module) for module in paths_of(ROOT)} == set(ORDER)


def test_no_folder_imports_a_higher_one():
  assert upward_imports(ROOT) == []


def test_data_imports_no_model_code():
  assert {
    folder_of(name)
    for module, imported in imports_of(ROOT).items()
    for name in imported
    if folder_of(module) == "data"
  } <= DATA_IMPORTS


def test_imports_have_no_cycle():
  check_no_cycle(ROOT)


def test_upward_imports_and_cycles_are_found(tmp_path):
  for name, code in {
    "ops/matmul.py": "def f():\n  from tvq_haiku.attention.vq import vq_attention",
    "attention/vq.py": "import tvq_haiku.attention.state",
    "attention/state.py": "from tvq_haiku.attention import vq",
  }.items():
    path = tmp_path / "tvq_haiku" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
  assert upward_imports(tmp_path) == ["tvq_haiku.ops.matmul imports tvq_haiku.attention.vq"]
  with pytest.raises(graphlib.CycleError, match="nodes are in a cycle"):
    check_no_cycle(tmp_path)


def test_every_module_has_a_test_file():
  def mirror(path):
    folder = (ROOT / "tests" / path.relative_to(ROOT / "tvq_haiku")).parent
    return folder / f"test_{path.name}"

  missing = {
    str(path.relative_to(ROOT / "tvq_haiku"))
    for path in paths_of(ROOT).values()
    if path.name != "__init__.py" and not mirror(path).exists()
  }
  assert missing == set(TESTED_ELSEWHERE)
  assert [name for name in TESTED_ELSEWHERE.values() if not (ROOT / "tests" / name).exists()] == []


def test_few_modules_lie_directly_in_the_package():
  assert len(list((ROOT / "tvq_haiku").glob("*.py"))) <= MAX_TOP_LEVEL_MODULES


def test_contributing_lists_every_folder():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  names = [
    f"{name}.py" if (ROOT / f"tvq_haiku/{name}.py").exists() else name for name in ORDER[:-1]
  ]
  assert [name for name in names if f"`{name}" not in text] == []


def test_no_file_is_long():
  paths = [
    path
    for folder in ("tvq_haiku", "experiments", "tests")
    for path in (ROOT / folder).rglob("*.py")
  ]
  lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
  assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
