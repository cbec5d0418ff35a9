"""How a command ends: exit statuses and messages of expected errors and of bugs."""

import shlex

import pytest

from experiments import launcher

from launching import run, workspace

assert workspace  # a fixture

pytestmark = pytest.mark.slow


def run_main(body, workspace):
  """Launches a command `demo` whose main function is `body`."""
  script = "\n".join(
    [
      "import threading",
      "from absl import flags",
      "import jax.numpy as jnp",
      "import numpy as np",
      "from experiments import launcher",
      "def main():",
      *(f"  {line}" for line in body.splitlines()),
      "launcher.launch('demo', main)",
    ]
  )
  return run(f"python -c {shlex.quote(script)}", workspace)


@pytest.mark.parametrize(
  "body, status, message",
  [
    ("raise ValueError('two\\nlines')", 1, "demo: two lines\n"),
    ("raise FileNotFoundError('no file')", 1, "demo: no file\n"),
    ("raise ImportError('no package')", 1, "demo: no package\n"),
    ("raise flags.ValidationError('wrong flag')", 2, "demo: wrong flag\n"),
    ("raise KeyboardInterrupt", 130, "demo: interrupted.\n"),
  ],
)
def test_expected_error_is_one_line_and_an_exit_status(workspace, body, status, message):
  assert run_main(body, workspace) == (status, "", message)


@pytest.mark.parametrize("body", ["jnp.zeros(1 << 46)", "np.ones(1 << 56)"])
def test_exhausted_memory_of_device_or_host_is_one_line(workspace, body):
  status, out, err = run_main(body, workspace)
  assert status == 1 and not out
  assert err.startswith("demo: out of memory (") and len(err.splitlines()) == 1, err
  assert "Use a smaller model or batch" in err


def test_bug_is_shown_with_its_traceback(workspace):
  status, out, err = run_main("raise RuntimeError('a bug')", workspace)
  assert status == 1 and not out
  assert "Traceback (most recent call last)" in err and "RuntimeError: a bug" in err


def test_error_in_a_thread_is_shown(workspace):
  body = (
    "thread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()\nprint('done')"
  )
  status, out, err = run_main(body, workspace)
  assert (status, out) == (0, "done\n")
  assert "Exception in thread" in err and "ZeroDivisionError" in err


def test_entries_of_list_flags_must_be_positive_integers():
  assert launcher.parse_positive("sizes", " 12 ") == 12
  for text in ("0", "-1", "1.5", "", "2k"):
    with pytest.raises(ValueError, match=r"--sizes: .* must be an integer of at least 1"):
      launcher.parse_positive("sizes", text)
