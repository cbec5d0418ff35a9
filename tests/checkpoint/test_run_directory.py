"""The files of a run, except the arrays of its checkpoints."""

import pytest

from tvq_haiku.checkpoint import run_directory
from tvq_haiku.checkpoint.run_directory import CheckpointError

import helpers
import privileges

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING


@pytest.fixture
def run(tmp_path):
  """The directory of a run with its configuration and with checkpoints that have no content."""
  run_directory.write_config(tmp_path, CONFIG, TRAIN)
  for name in ("4", "12", "10", "14.orbax-checkpoint-tmp-7"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  return tmp_path


def test_complete_steps_are_listed_in_ascending_order(run):
  assert run_directory.saved_steps(run) == [4, 10, 12]
  assert run_directory.latest_step(run) == 12
  assert run_directory.has_checkpoint(run)


def test_directory_without_checkpoints(tmp_path):
  for directory in (tmp_path, tmp_path / "nowhere"):
    assert not run_directory.has_checkpoint(directory)
    assert run_directory.saved_steps(directory) == []
    assert run_directory.latest_step(directory) is None
  run_directory.write_config(tmp_path, CONFIG, TRAIN)
  assert not run_directory.has_checkpoint(tmp_path)
  assert run_directory.latest_step(tmp_path) is None


def test_checkpoints_without_a_config(run):
  (run / "config.json").unlink()
  assert run_directory.latest_step(run) is None
  with pytest.raises(CheckpointError, match=r"checkpoints but no config\.json.* Restore the file"):
    run_directory.has_checkpoint(run)


def test_config_round_trip(run):
  assert run_directory.load_config(run) == (CONFIG, TRAIN)


@pytest.mark.parametrize(
  "text",
  [
    "",
    "{",
    "[]",
    "{}",
    '{"format": 99, "model": {}, "train": {}}',
    '{"format": 1, "model": {"n_vocab": -1}, "train": {}}',
  ],
)
def test_damaged_config_is_named(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(CheckpointError, match=r"config\.json is damaged or was written by"):
    run_directory.load_config(tmp_path)


def test_all_fields_that_differ_are_named(run):
  with pytest.raises(
    CheckpointError,
    match=r"configuration: n_code is 6 in the run, 7 here; lr_max is 0.01 in the run, 0.02 here\.",
  ):
    run_directory.check_same_run(run, CONFIG.replace(n_code=7), TRAIN.replace(lr_max=0.02))


def test_fields_that_do_not_change_results_may_differ(run):
  changed = CONFIG.replace(remat="layer", reduction="scan"), TRAIN.replace(n_accumulate=2)
  run_directory.check_same_run(run, *changed)


def test_pair_of_attention_types_is_compared(tmp_path):
  hybrid = CONFIG.replace(head_type="shga", attn_type=("vq", "full"))
  run_directory.write_config(tmp_path, hybrid, TRAIN)
  run_directory.check_same_run(tmp_path, hybrid, TRAIN)
  message = r"attn_type is \('vq', 'full'\) in the run, \('full', 'vq'\) here"
  with pytest.raises(CheckpointError, match=message):
    run_directory.check_same_run(tmp_path, hybrid.replace(attn_type=("full", "vq")), TRAIN)


def test_run_can_be_extended_but_not_shortened(run):
  longer = TRAIN.replace(n_extra_step=4)
  run_directory.check_same_run(run, CONFIG, longer)
  run_directory.extend(run, TRAIN)
  assert run_directory.load_config(run) == (CONFIG, TRAIN)
  run_directory.write_config(run, CONFIG, TRAIN, rng_impl="rbg")
  run_directory.extend(run, longer.replace(n_accumulate=2))
  assert run_directory.load_config(run) == (CONFIG, longer)
  assert run_directory.load_rng_impl(run) == "rbg"
  message = "n_extra_step is 4 in the run, 0 here. n_extra_step can be raised, but not lowered"
  with pytest.raises(CheckpointError, match=message):
    run_directory.check_same_run(run, CONFIG, TRAIN)


def test_refusal_of_more_updates_names_both_ways_to_make_them(run):
  with pytest.raises(CheckpointError, match="n_max_step is 12 in the run, 16 here") as error:
    run_directory.check_same_run(run, CONFIG, TRAIN.replace(n_max_step=16))
  assert "set n_extra_step (--config.n_max_step=12 --config.n_extra_step=N)" in str(error.value)
  assert f"--init={run} --workdir=OTHER" in str(error.value)


def test_later_checkpoints_are_set_aside(run):
  (run / "damaged" / "12").mkdir(parents=True)  # set aside earlier
  run_directory.set_aside_later(run, after=4)
  assert run_directory.saved_steps(run) == [4]
  assert sorted(p.name for p in (run / "damaged").iterdir()) == ["10", "12", "12-2"]
  run_directory.set_aside_later(run, after=4)
  assert run_directory.saved_steps(run) == [4]


def test_checkpoint_without_permissions_is_set_aside(run):
  (run / "checkpoints" / "12").chmod(0)
  with privileges.dropped():
    run_directory.set_aside_later(run, after=10)
  assert run_directory.saved_steps(run) == [4, 10]


def test_checkpoint_that_cannot_be_moved_is_named(run):
  (run / "checkpoints").chmod(0o555)
  try:
    with (
      privileges.dropped(),
      pytest.raises(
        CheckpointError,
        match=r"/12 can be neither loaded nor moved to .*/damaged/12 \(Permission denied\)",
      ),
    ):
      run_directory.set_aside_later(run, after=10)
  finally:
    (run / "checkpoints").chmod(0o755)
