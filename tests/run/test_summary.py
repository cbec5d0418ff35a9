"""The summaries of a model and of its data."""

import jax
import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.data.token_cache import SplitStatistics
from tvq_haiku.evaluation import flops, memory_plan
from tvq_haiku.run import best_checkpoint, summary

from small_experiments import CONFIG, TRAIN_CONFIG

pytestmark = pytest.mark.slow


def test_parameters_are_counted():
  state = tvq.init_train_state(CONFIG, TRAIN_CONFIG, jax.random.key(0))
  assert summary.count_params(CONFIG) == sum(x.size for x in jax.tree.leaves(state.params))


def test_state_is_counted_in_bytes_per_batch_element():
  def n_bytes(batch_size):
    return sum(x.nbytes for x in jax.tree.leaves(tvq.initial_state(CONFIG, batch_size)))

  assert summary.state_bytes(CONFIG) == n_bytes(1) == n_bytes(3) / 3


def test_model_is_described_with_all_settings_and_resources():
  lines = summary.describe_model(CONFIG, TRAIN_CONFIG).splitlines()
  assert lines[0] == "Model:" and "  d_model           16" in lines
  assert "Training:" in lines and "  sequence_len      48" in lines
  resources = dict(
    line.split(":", 1) for line in lines[lines.index("Training:") + 1 :] if ":" in line
  )
  resources = {name: text.strip() for name, text in resources.items()}
  n_parameter, n_token = summary.count_params(CONFIG), 2 * 24  # B * update_len
  assert resources["Parameters"] == f"{n_parameter:,}"
  forward = 2 * flops.forward_multiply_adds(CONFIG, 48) / 48
  assert resources["FLOPs per token"] == (
    f"{forward:,.0f} forward, {flops.training_flops(CONFIG, 48):,.0f} in training"
  )
  assert resources["Per update"] == f"{n_token} tokens; 2 updates per batch"
  assert resources["All updates"] == f"{8 * n_token} tokens"
  memory = memory_plan.plan_memory(CONFIG, TRAIN_CONFIG).memory
  assert f"about {sum(memory.values()) / 1e6:.1f} MB (" in resources["Training memory"]
  assert f"parameters {4 * n_parameter / 1e6:.1f} MB" in resources["Training memory"]
  assert resources["State"].startswith(f"{summary.state_bytes(CONFIG) / 1e6:.1f} MB per batch ")


@pytest.mark.parametrize("has_words", [True, False])
def test_data_is_described_in_one_line(has_words):
  statistics = SplitStatistics(
    n_document=3,
    n_byte=2000,
    n_word=500,
    n_token=1000,
    unigram_entropy=4.0,
    checksum=7,
    vocabulary="pieces",
    dtype="<u2",
    offset=0,
  )
  words = summary.describe_data("train", statistics, has_words=has_words).split()
  numbers = ["1,000", "tokens", "3", "documents", "2,000", "bytes"]
  numbers += ["500", "words"] if has_words else []
  entropy = "unigram entropy 4.000 bits per token, 2.000 bits per byte"
  assert words == ["train", *numbers, *entropy.split()]


def test_run_is_described_with_its_best_validation(runs):
  experiment, _ = runs["text"]
  status = best_checkpoint.read_validations(experiment.workdir)
  best = status.best_metrics["bits_per_byte"]
  assert summary.describe_run(experiment.workdir).splitlines() == [
    f"Run:               {experiment.workdir}",
    "Updates:           8 of 8",
    f"Best validation:   {best:.4f} bits per byte, after {status.best_step} updates",
  ]


def test_run_without_validation_is_described(tmp_path):
  run_directory.write_config(tmp_path, CONFIG, TRAIN_CONFIG.replace(n_extra_step=2000))
  (tmp_path / "checkpoints" / "1500").mkdir(parents=True)
  text = summary.describe_run(tmp_path)
  assert "1,500 of 2,008\n" in text and text.endswith("no validation with a finite loss")


def test_large_sizes_are_printed_in_gigabytes():
  text = summary.describe_model(tvq.TransformerConfig.pg19(), tvq.TrainConfig.pg19())
  assert "parameters 5.3 GB" in text  # 1,314,659,584 of 4 bytes
