"""Documentation: docstrings have the common form, examples run, and links are not broken."""

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import pathlib
import pkgutil
import re

import pytest

import tvq_haiku as tvq

ROOT = pathlib.Path(__file__).parent.parent
MODULES = ["tvq_haiku", *sorted(m.name for m in pkgutil.walk_packages(tvq.__path__, "tvq_haiku."))]
FILES = sorted(
  str(path.relative_to(ROOT))
  for folder in ("tvq_haiku", "experiments")
  for path in (ROOT / folder).rglob("*.py")
)
# A docstring begins with a verb in the third person or with a noun phrase, not with one of these.
FORBIDDEN = set(
  "What Of Where Whether How Which So That Those When Who Why If To From "
  "Compute Create Get Give Make Read Return Run Set Take Write".split()
)
MANY = 3  # a function with at least this many parameters must describe each of them


def public_definitions(tree, prefix=""):
  """Yields the qualified name and the node of public classes, functions and methods."""
  for node in tree.body:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
      is_public = not node.name.startswith("_") or node.name == "__call__"
      if is_public:
        yield prefix + node.name, node
      if is_public and isinstance(node, ast.ClassDef):
        yield from public_definitions(node, f"{node.name}.")


def parameters(node):
  """Returns the names of the parameters of a function, without `self` and `cls`."""
  a = node.args
  names = [x.arg for x in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if x]
  return [name for name in names if name not in ("self", "cls")]


def args_section(docstring):
  """Returns the names of the parameters that the `Args` section of a docstring describes."""
  section = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
  lines = [] if section is None else section[1].splitlines()
  matches = (re.match(r"  \*{0,2}(\w+)( \(.*\))?: \S", line) for line in lines)
  return [match[1] for match in matches if match]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
  module = importlib.import_module(name)
  results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
  assert results.failed == 0


@pytest.mark.parametrize("file", FILES)
def test_docstrings_have_the_common_form(file):
  tree = ast.parse((ROOT / file).read_text())
  problems = []
  for name, node in [("module", tree), *public_definitions(tree)]:
    docstring = ast.get_docstring(node)
    if not docstring:
      problems.append(f"{name} has no docstring")
      continue
    first = docstring.split()[0]
    if not re.match("[A-Z`]", first) or first in FORBIDDEN:
      problems.append(f"{name} begins with {first!r}")
    if isinstance(node, ast.FunctionDef) and len(parameters(node)) >= MANY:
      if missing := set(parameters(node)) - set(args_section(docstring)):
        problems.append(f"{name} does not describe {sorted(missing)}")
  assert problems == []


def texts_in(file):
  """Returns the strings of several words in a file, without docstrings."""
  tree = ast.parse(file.read_text())
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
  docstrings = {
    node.body[0].value
    for node in ast.walk(tree)
    if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)
  }
  return [
    node.value
    for node in set(ast.walk(tree)) - docstrings
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
  ]


def test_messages_and_help_texts_speak_of_updates_and_batches():
  """A step could be either, so only names of fields, metrics and functions contain the word."""
  folders = ("experiments", "tvq_haiku/run", "tvq_haiku/checkpoint", "tvq_haiku/training")
  files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
  files += [ROOT / "tvq_haiku" / name for name in ("config.py", "train_config.py")]
  texts = [text for file in files for text in texts_in(file)]
  assert len(texts) > 300
  assert [text for text in texts if re.search(r"\bsteps?\b", text)] == []


@pytest.mark.parametrize("package", ["tvq_haiku", "tvq_haiku.data"])
def test_public_names_are_documented(package):
  namespace = vars(importlib.import_module(package))
  names = [name for name in namespace if not name.startswith("_")]
  assert len(names) > 15
  for name in names:
    if not isinstance(namespace[name], (int, str, type(...))):
      assert inspect.getdoc(namespace[name]), name


@pytest.mark.parametrize(
  "name",
  ["vq_attention", "make_transformer", "initial_state", "TransformerConfig", "TrainConfig"],
)
def test_main_entry_points_have_examples(name):
  assert ">>>" in inspect.getdoc(getattr(tvq, name))


def test_version_is_the_same_everywhere():
  assert f"version: {tvq.__version__}\n" in (ROOT / "CITATION.cff").read_text()
  assert f"\n## {tvq.__version__}" in (ROOT / "CHANGELOG.md").read_text()
  assert importlib.metadata.version("tvq_haiku") == tvq.__version__


DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/design.md"]


def test_installations_from_the_checkout_are_editable():
  """A copy would be used in place of the checkout, and would not change with it."""
  found = re.findall(
    r"pip install (?:-e )?'?\.", "".join((ROOT / x).read_text() for x in DOCUMENTS)
  )
  assert len(found) >= 4 and all("-e" in command for command in found)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_to_files_are_not_broken(name):
  path = ROOT / name
  for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
    assert (path.parent / target).exists(), target
