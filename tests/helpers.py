"""Models, batches, checkpoints and comparisons that tests share."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import tvq_haiku as tvq
from tvq_haiku import data

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def golden(name):
  """Returns the arrays of a golden file by name, and its model configuration."""
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    arrays = dict(arrays)
  settings = json.loads(bytes(arrays["config"]))
  for dtype in ("param_dtype", "dtype"):  # TransformerConfig has `precision` instead
    settings.pop(dtype)
  return arrays, tvq.TransformerConfig(**settings)


def subtree(arrays, prefix):
  """Returns the arrays whose names start with `prefix/`, by the rest of the name."""
  prefix += "/"
  return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@functools.cache
def random_params(config, seed=0):
  """Samples parameters that are neither 0 nor 1, so that each of them changes the output."""
  rng = np.random.default_rng(seed)

  def sample(name, shape):
    fan_in = shape[-2] if name == "kernel" else 1
    values = rng.standard_normal(shape) * (0.3 if name in ("u", "v", "scale") else fan_in**-0.5)
    if name in ("gain", "c_count"):
      values = 1.0 + 0.3 * np.abs(values)
    return jnp.asarray(values, jnp.float32)

  return {
    module: {name: sample(name, leaf.shape) for name, leaf in leaves.items()}
    for module, leaves in tvq.params_shapes(config).items()
  }


def random_tokens(config, batch_size, length, seed=0):
  """Samples tokens [B, T] int32."""
  shape = (batch_size, length)
  return np.random.default_rng(seed).integers(0, config.n_vocab, shape).astype(np.int32)


def random_features(config, batch_size, length, seed=0):
  """Samples features [B, T, D] f32, the inputs of a model with `no_emb`."""
  shape = (batch_size, length, config.d_model)
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_trees_close(actual, expected, atol=2e-5, rtol=1e-5):
  """Compares two trees of arrays within tolerances."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=rtol), actual, expected
  )


def assert_same(actual, expected):
  """Compares two trees of arrays exactly."""
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


_ONE_ATTENTION = dict(head_type="mqa", n_head=2, d_v=8)  # programs of half the size

# Name of a variant of the model -> settings for `tiny`.
VARIANTS = {
  "plain": dict(n_layer=2),
  "heads": dict(n_head=2, d_v=32),
  "absolute": dict(pe_abs=True, e_tie=True, e_preln=True, e_scale=0.3),
  "long memory": dict(**_ONE_ATTENTION, block_len=4, mem_len=24),
  "short memory": dict(**_ONE_ATTENTION, block_len=16, mem_len=3),
  "single tokens": dict(**_ONE_ATTENTION, block_len=1, mem_len=5),
  "no cache": dict(**_ONE_ATTENTION, agg_cache=False),
  "crossing": dict(**_ONE_ATTENTION, doc_mask=False),
  "assoc_scan": dict(**_ONE_ATTENTION, reduction="assoc_scan", block_len=4, mem_len=6),
  "mha": dict(head_type="mha", n_head=2, d_v=8, reduction="serial", n_layer=2),
  "mqa": dict(head_type="mqa", n_head=2, d_v=8, reduction="matmul", block_len=4),
  "grouped": dict(head_type="mha", n_head=4, n_kv_head=2, d_v=4, reduction="scan"),
  "full": dict(**_ONE_ATTENTION, attn_type="full", mem_len=64),
  "full mha": dict(attn_type="full", head_type="mha", n_head=2, d_v=8, mem_len=5, block_len=4),
  "hybrid": dict(attn_type=("vq", "full"), mem_len=5, full_len=24),
  "window hybrid": dict(attn_type=("window", "vq"), mem_len=5, n_head=2, d_v=8),
}


def tiny(**changes):
  """Makes a small config.

  It has one layer, because compilation time grows with the number of layers. Tests that need more
  layers pass n_layer.
  """
  return tvq.TransformerConfig.tiny(
    **{
      **dict(n_vocab=11, d_model=16, d_k=8, d_v=16, n_code=6, n_layer=1, block_len=8, mem_len=8),
      **changes,
    }
  )


# A training run of a few seconds: 12 updates, two per batch.
RUN = tvq.TransformerConfig.tiny(
  head_type="mqa",
  n_head=2,
  d_model=16,
  d_k=8,
  d_v=8,
  n_code=6,
  n_layer=1,
  block_len=8,
  mem_len=8,
  p_dropres=0.1,
  p_droplyr=0.2,
)
RUN_TRAINING = tvq.TrainConfig(
  n_warmup_step=2, n_max_step=12, sequence_len=32, update_len=16, global_batch_size=2, lr_max=1e-2
)


def run_batches():
  """Returns the batches of the training run that `RUN` and `RUN_TRAINING` describe."""
  text = data.austen()["Emma"][:3000]
  return data.PackedBatches(
    data.stream_of([data.ByteVocabulary.encode(text)]), batch_size=2, sequence_len=32
  )


def apply(params, config, tokens, state=None, **kwargs):
  """Runs the compiled model on tokens [B, T] from a state; None is the initial state."""
  state = tvq.initial_state(config, tokens.shape[0]) if state is None else state
  return jitted(config)(params, tokens, state, kwargs)


@functools.cache
def jitted(config):
  """Returns a compiled model; each configuration is compiled once."""
  model = tvq.make_transformer(config)
  return jax.jit(lambda p, t, s, kwargs: model.apply(p, None, t, s, **kwargs))


def make_checkpoint(step=0):
  """Returns a checkpoint of `RUN` after `step` updates; its random parameters depend on `step`."""
  params = random_params(RUN, seed=step)
  state = tvq.init_train_state(RUN, RUN_TRAINING, jax.random.key(0), params)
  state = state._replace(step=jnp.int32(step))
  return tvq.Checkpoint(RUN, RUN_TRAINING, state, jax.random.key(1), step // 2)


def overflowing_params(config, module="transformer/layers/attention_1/q", name="kernel"):
  """Returns random parameters, one of which is so large that its products overflow."""
  params = random_params(config)
  value = params[module][name].at[..., 0, 0].set(3e38)
  return {**params, module: {**params[module], name: value}}
