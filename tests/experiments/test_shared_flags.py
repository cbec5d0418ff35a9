"""The flags that several commands share."""

from absl import flags
import pytest

from experiments import shared_flags


def parse(*arguments):
  """Parses arguments with all shared flags."""
  values = flags.FlagValues()
  shared_flags.define_run_flags(values)
  shared_flags.define_weights_flag(values)
  shared_flags.define_evaluation_flags(values)
  shared_flags.define_sampling_flags(values)
  values(["command", *arguments])
  return values


@pytest.mark.parametrize("name", ["workdir", "checkpoint"])
def test_directory_of_the_run_has_an_earlier_name(name):
  assert parse(f"--{name}=runs/a").workdir == "runs/a"


def test_directory_of_the_run_is_required():
  with pytest.raises(flags.Error, match="--workdir"):
    parse("--weights=last")


def test_groups_hold_the_values_of_the_flags():
  values = parse("--workdir=a", "--prompt=Anne", "--prompt=Elliot", "--top_k=5", "--eval_rows=3")
  assert shared_flags.read_group(shared_flags.EvalFlags, values) == shared_flags.EvalFlags(
    eval_rows=3, eval_window=512, weights="best"
  )
  sampling = shared_flags.read_group(shared_flags.SampleFlags, values)
  assert (sampling.prompt, sampling.top_k) == (["Anne", "Elliot"], 5)
  assert (sampling.temperature, sampling.top_p, sampling.length) == (1.0, None, 500)


@pytest.mark.parametrize(
  "argument", ["--top_p=0", "--top_p=1.1", "--length=0", "--temperature=-1", "--weights=worst"]
)
def test_values_out_of_range_are_refused(argument):
  with pytest.raises(flags.Error, match=argument.split("=")[0].strip("-")):
    parse("--workdir=a", argument)
