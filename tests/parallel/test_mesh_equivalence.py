"""Training, evaluation and generation on a mesh give the results of one device."""

import functools

import jax
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.parallel import sharding
from tvq_haiku.training import gradients as gradients_lib
from tvq_haiku.training import train_step as train_step_lib

import helpers

pytestmark = pytest.mark.slow

CONFIG = helpers.tiny(n_layer=1, p_dropres=0.1, p_dropsin=0.1, p_droplyr=0.1, p_dropemb=0.1)
TRAIN = tvq.TrainConfig(
  n_warmup_step=1, n_max_step=12, sequence_len=128, update_len=64, global_batch_size=8, lr_max=1e-2
)
MESHES = ("data:8", "fsdp:8", "sequence:8", "data:2,sequence:2,model:2")
HEADS = {
  "shga": CONFIG,
  "heads": CONFIG.replace(n_head=2, d_v=8),
  "mha": CONFIG.replace(head_type="mha", n_head=2, d_v=8),
  "mqa": CONFIG.replace(head_type="mqa", n_head=2, d_v=8),
  "grouped, tied": CONFIG.replace(
    head_type="mha", n_head=4, n_kv_head=2, d_v=8, e_tie=True, e_preln=True, pe_abs=True, n_vocab=16
  ),
}


def batches(config, n=3, train_cfg=TRAIN):
  """Yields batches with documents that start at any token, and with padding in some sequences."""
  for seed in range(n):
    rng = np.random.default_rng(seed)
    shape = (train_cfg.global_batch_size, train_cfg.sequence_len)
    tokens = helpers.random_tokens(config, shape[0], shape[1] + 1, seed=seed)
    docs = np.sort(rng.integers(0, 3, shape), axis=1).astype(np.int32)
    docs[1, 100:] = docs[3, 30:] = -1
    yield {
      "inputs": helpers.random_features(config, *shape, seed) if config.no_emb else tokens[:, :-1],
      "targets": tokens[:, 1:],
      "doc_ids": docs,
      "loss_mask": np.ones(shape, np.int32),
    }


def train_on(mesh, config, train_cfg=TRAIN):
  """Returns the final train state and all losses of three steps."""
  mesh = sharding.make_mesh(mesh) if mesh else None
  state = tvq.init_train_state(config, train_cfg, jax.random.key(0), mesh=mesh)
  step = tvq.make_train_step(config, train_cfg, mesh)
  losses = []
  for batch in batches(config, train_cfg=train_cfg):
    state, metrics = step(state, batch, jax.random.key(1))
    losses += metrics["loss_lm"].tolist()
  assert step.n_compiled() == 1
  return jax.device_get(state), losses


train_on_one_device = functools.cache(functools.partial(train_on, None))


def assert_equal_runs(got, want):
  np.testing.assert_allclose(got[1], want[1], atol=1e-5, rtol=0)
  helpers.assert_trees_close(got[0].params, want[0].params, atol=5e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_training_on_a_mesh_equals_one_device(mesh):
  assert_equal_runs(train_on(mesh, HEADS["mqa"]), train_on_one_device(HEADS["mqa"]))


def gradients_on(mesh, config):
  """Returns loss, state and gradients of one window, with dropout."""
  mesh = sharding.make_mesh(mesh) if mesh else None
  params, batch = helpers.random_params(config), next(batches(config))
  args = (params, {name: x[:, :64] for name, x in batch.items()}, tvq.initial_state(config, 8))
  args = args if mesh is None else jax.device_put(args, sharding.replicated(mesh))

  def function(params, batch, state):
    with sharding.use_mesh(mesh):
      return gradients_lib.loss_gradients(
        params, config, jax.random.key(3), batch, state, sequence_rng=jax.random.key(4)
      )

  return jax.device_get(jax.jit(function)(*args))


gradients_on_one_device = functools.cache(functools.partial(gradients_on, None))


@pytest.mark.parametrize(
  "heads, mesh",
  [
    *((heads, "fsdp:4,model:2") for heads in HEADS),
    ("heads", "data:2,sequence:4"),
    ("mha", "data:2,sequence:4"),
  ],
)
def test_every_head_type_equals_one_device(heads, mesh):
  helpers.assert_trees_close(
    gradients_on(mesh, HEADS[heads]), gradients_on_one_device(HEADS[heads])
  )


@pytest.mark.parametrize(
  "change",
  [
    dict(reduction="scan"),
    dict(agg_cache=False),
    dict(grad_thru_cache=False),
    dict(remat="layer", n_layer=2),
  ],
  ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)
def test_other_settings_equal_one_device_with_model_and_sequence_axes(change):
  config = HEADS["mqa"].replace(**change)
  helpers.assert_trees_close(
    gradients_on("sequence:4,model:2", config), gradients_on_one_device(config)
  )


def test_full_attention_on_a_mesh_equals_one_device():
  config = HEADS["mqa"].replace(attn_type="full", mem_len=64)
  helpers.assert_trees_close(
    gradients_on("data:4,model:2", config), gradients_on_one_device(config)
  )


def test_training_a_hybrid_on_features_on_a_mesh_equals_one_device():
  config = CONFIG.replace(attn_type=("vq", "full"), full_len=40, no_emb=True, e_tie=True)
  assert_equal_runs(train_on("data:2,model:2", config), train_on(None, config))


def test_adafactor_on_a_mesh_equals_one_device():
  train_cfg = TRAIN.replace(optimizer="adafactor", lr_max=1e-3, wd_lam=1e-4)
  config = HEADS["mqa"]
  got, want = train_on("fsdp:4,model:2", config, train_cfg), train_on(None, config, train_cfg)
  np.testing.assert_allclose(got[1], want[1], atol=2e-5, rtol=0)


def test_training_with_microbatches_equals_complete_batches():
  config = HEADS["mqa"].replace(p_dropres=0.0, p_dropsin=0.0, p_droplyr=0.0, p_dropemb=0.0)
  want = train_on_one_device(config)
  assert_equal_runs(train_on(None, config, TRAIN.replace(n_accumulate=4)), want)
  assert_equal_runs(train_on("data:4,model:2", config, TRAIN.replace(n_accumulate=2)), want)


def test_evaluation_on_a_mesh_equals_one_device():
  params = helpers.random_params(CONFIG)
  stream = data.stream_of([np.arange(300) % 11])
  want = tvq.evaluate(params, CONFIG, stream, batch_size=4, window_len=64)
  mesh = sharding.make_mesh("data:4,model:2")
  params = jax.device_put(params, sharding.replicated(mesh))
  got = tvq.evaluate(params, CONFIG, stream, batch_size=4, window_len=64, mesh=mesh)
  assert got.tokens == want.tokens == 301 and abs(got.nats - want.nats) < 1e-3


def test_generation_with_sharded_parameters_equals_one_device():
  config = HEADS["mha"]
  params, prompts = helpers.random_params(config), helpers.random_tokens(config, 2, 13)
  shapes = train_step_lib.train_state_shapes(config, TRAIN)
  shardings = sharding.train_state_shardings(shapes, sharding.make_mesh("fsdp:2,model:2")).params
  want, got = (
    tvq.generate(p, config, prompts, max_new_tokens=9, rng=jax.random.key(0), temperature=0.8)
    for p in (params, jax.device_put(params, shardings))
  )
  helpers.assert_same(got.tokens, want.tokens)
  np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
