"""Estimates of memory and traffic, compared with exact numbers and with the compiled program."""

import jax
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.evaluation import memory_plan

CONFIG = tvq.TransformerConfig(
  n_vocab=256,
  d_model=64,
  d_k=32,
  d_v=128,
  n_code=64,
  n_layer=2,
  block_len=64,
  mem_len=64,
  remat="none",
)
TRAIN = tvq.TrainConfig(sequence_len=1024, update_len=1024, global_batch_size=8)
N_PARAM = sum(leaf.size for leaf in jax.tree.leaves(tvq.params_shapes(CONFIG)))


def test_one_device_holds_everything_and_sends_nothing():
  plan = memory_plan.plan_memory(CONFIG, TRAIN)
  state = jax.eval_shape(lambda: tvq.initial_state(CONFIG, 8))
  assert plan.memory["parameters"] == plan.memory["gradients"] == 4 * N_PARAM
  assert plan.memory["states"] == memory_plan.tree_bytes(state)
  assert plan.memory["logits"] == 3 * 4 * plan.n_token * CONFIG.n_vocab
  assert plan.n_token == 8 * 1024 and plan.traffic == {} and "layer" not in plan.memory


def test_estimate_is_within_a_factor_of_two_of_the_compiled_step():
  train_cfg = TRAIN.replace(global_batch_size=2)
  state = jax.eval_shape(lambda: tvq.init_train_state(CONFIG, train_cfg, jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((2, 1024), np.int32)
  step = tvq.make_train_step(CONFIG, train_cfg)
  batch = {"inputs": tokens, "targets": tokens}
  memory = step.lower(state, batch, jax.random.key(0)).compile().memory_analysis()
  compiled = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  estimate = sum(memory_plan.plan_memory(CONFIG, train_cfg).memory.values())
  assert 0.5 < estimate / compiled < 2.0


def test_data_parallel_devices_sum_their_gradients():
  """A ring of n devices sends 2 (n-1)/n of what it sums."""
  plan = memory_plan.plan_memory(CONFIG, TRAIN, {"data": 4})
  assert plan.traffic == {"data": 2 * 4 * N_PARAM * 3 // 4}
  assert plan.memory["parameters"] == 4 * N_PARAM and plan.n_token == 2 * 1024


def test_fsdp_devices_share_parameters_and_optimizer():
  one, four = (memory_plan.plan_memory(CONFIG, TRAIN, {"fsdp": n}) for n in (1, 4))
  for purpose in ("parameters", "optimizer"):
    assert 0.25 <= four.memory[purpose] / one.memory[purpose] < 0.3  # small arrays are replicated
  # Parameters are gathered for the forward and the backward pass, and gradients are scattered.
  assert four.traffic == {"fsdp": 3 * 4 * N_PARAM * 3 // 4}
  assert four.memory["layer"] == 4 * N_PARAM // CONFIG.n_layer


def test_model_axis_sums_the_output_of_each_branch():
  plan = memory_plan.plan_memory(CONFIG, TRAIN, {"model": 2})
  branches = 2 * CONFIG.n_layer * 8 * 1024 * CONFIG.d_model * 4
  assert plan.traffic == {"model": 2 * 2 * branches // 2}  # twice (n-1)/n, in both passes


def test_sequence_axis_sends_states():
  plan = memory_plan.plan_memory(CONFIG, TRAIN, {"sequence": 4})
  assert plan.traffic == {"sequence": 2 * 3 * plan.memory["states"]}
  assert plan.n_token == 8 * 256


def test_accumulation_and_remat_reduce_activations():
  plain = memory_plan.plan_memory(CONFIG, TRAIN).memory["activations"]
  parts = memory_plan.plan_memory(CONFIG, TRAIN.replace(n_accumulate=4)).memory["activations"]
  layers = memory_plan.plan_memory(CONFIG.replace(remat="layer"), TRAIN).memory["activations"]
  assert parts == plain // 4
  assert layers == plain // 2 + 2 * 8 * 1024 * CONFIG.d_model * 4


def test_a_hybrid_of_features_has_no_embeddings_and_the_states_of_its_parts():
  config = CONFIG.replace(attn_type=("vq", "full"), full_len=512, no_emb=True)
  plan = memory_plan.plan_memory(config, TRAIN)
  shapes = jax.eval_shape(lambda: tvq.initial_state(config, 8))
  assert shapes.attention_2.memory_keys.shape == (2, 8, 1, 512, 32)
  assert plan.memory["states"] == memory_plan.tree_bytes(shapes)
  embeddings, codebook = 256 * 64 + 256, 2 * (64 * 32 + 64)
  assert plan.memory["parameters"] == 4 * (N_PARAM - embeddings - codebook)


def test_sizes_that_do_not_fit_are_rejected():
  with pytest.raises(ValueError, match="global_batch_size=8"):
    memory_plan.plan_memory(CONFIG, TRAIN, {"data": 3})


def test_description():
  plan = memory_plan.plan_memory(CONFIG, TRAIN, {"data": 2, "fsdp": 2})
  text = memory_plan.describe_plan(CONFIG, TRAIN, {"data": 2, "fsdp": 2})
  assert text.startswith("On data:2,fsdp:2, each of 4 devices:\n")
  assert f"about {sum(plan.memory.values()) / 1e9:,.2f} GB (parameters " in text
  assert "2,048 tokens at a time, with remat=none" in text
