"""With JAX_ENABLE_X64 everything is computed in float32, with the same results as without it."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.training import train_step

import helpers

pytestmark = pytest.mark.slow

CONFIG = helpers.RUN.replace(c_revive=0.1, pe_abs=True, p_dropemb=0.1, p_dropsin=0.1)
MODELS = {
  "vq": CONFIG,
  "hybrid": CONFIG.replace(
    head_type="shga", attn_type=("full", "vq"), full_len=24, reduction="scan"
  ),
  "encoder": CONFIG.replace(causal=False),
}
TEXT = "It is a truth universally acknowledged"


def with_and_without_x64(function):
  """Returns the result of `function` twice, as arrays in host memory."""
  results = []
  for context in (contextlib.nullcontext(), jax.enable_x64(True)):
    with context:
      results.append(jax.device_get(function()))
  return results


def assert_same_types(actual, expected):
  """Compares the dtypes of two trees of arrays or shapes."""
  assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)


def assert_same_but_for_rounding(without, with_x64, atol=1e-5):
  assert_same_types(*(jax.tree.map(np.asarray, x) for x in (with_x64, without)))
  helpers.assert_trees_close(with_x64, without, atol=atol)


@pytest.mark.parametrize(
  "name, optimizer",
  [("vq", "adamw"), ("vq", "lion"), ("vq", "adafactor"), ("hybrid", "adamw"), ("encoder", "adamw")],
)
def test_a_training_step_has_no_float64_arrays(name, optimizer):
  config = MODELS[name]
  train_cfg = helpers.RUN_TRAINING.replace(optimizer=optimizer, wd_lam=1e-3)
  with jax.enable_x64(True):
    state = train_step.train_state_shapes(config, train_cfg)
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    step = tvq.make_train_step(config, train_cfg, with_metrics=True)
    batch = dict(inputs=tokens, targets=tokens, doc_ids=tokens, loss_mask=tokens)
    trace = jax.make_jaxpr(step._step, return_shape=True)
    jaxpr, (new_state, metrics) = trace(state, batch, jax.random.key(0))
  # Optax computes some scalars, such as powers of the update count, in the widest type.
  assert re.findall(r"\w+:f64\[\d[^]]*\] = .*", str(jaxpr)) == []
  assert_same_types(new_state, state)
  assert {str(x.dtype) for x in metrics.values()} == {"float32"}


def test_training_generation_and_evaluation_give_the_same_results():
  config = MODELS["hybrid"]
  params = helpers.random_params(config)

  def results():
    batch = next(helpers.run_batches())
    batch["loss_mask"] = batch["loss_mask"].astype(np.float64)
    step = tvq.make_train_step(config, helpers.RUN_TRAINING)
    state, metrics = step(
      tvq.init_train_state(config, helpers.RUN_TRAINING, jax.random.key(0), params),
      batch,
      jax.random.key(1),
    )
    prompts = np.array(helpers.random_tokens(config, 2, 9), np.int64)
    generated = tvq.generate(
      params,
      config,
      prompts,
      max_new_tokens=6,
      rng=jax.random.key(0),
      temperature=0.8,
      top_p=0.9,
      min_p=0.01,
      stop=[[1, 2]],
    )
    logits, _ = tvq.decode_step(params, config, prompts[:, 0], tvq.initial_state(config, 2))
    stream = data.stream_of([data.ByteVocabulary.encode(TEXT)])
    evaluated = tvq.evaluate(params, config, stream, batch_size=2, window_len=16)
    return state, metrics, generated, logits, tuple(evaluated)

  without, with_x64 = with_and_without_x64(results)
  assert_same_but_for_rounding(without, with_x64)


def test_scores_conversations_compression_and_files_give_the_same_results(tmp_path):
  params = helpers.random_params(CONFIG)

  def results():
    talk = tvq.Conversation(params, CONFIG, rng=jax.random.key(0), temperature=0.0)
    written = "".join(talk.write(TEXT, max_new_tokens=8))
    packed = tvq.compress(params, CONFIG, TEXT.encode(), rows=2)
    assert tvq.decompress(params, CONFIG, packed) == TEXT.encode()
    tvq.export_params(params, CONFIG, tmp_path / "params.safetensors")
    exported, _ = tvq.import_params(tmp_path / "params.safetensors")
    scores = tvq.score(params, CONFIG, [TEXT, "Bath"])
    return [ord(x) for x in written], exported, tuple(scores)

  assert_same_but_for_rounding(*with_and_without_x64(results), atol=1e-4)


def test_attention_converts_float64_arrays():
  def results():
    rngs = jax.random.split(jax.random.key(0), 4)
    q, k, v, codebook = (
      np.asarray(jax.random.normal(rng, shape, jnp.float32), np.float64)
      for rng, shape in zip(
        rngs, [(2, 20, 2, 4), (2, 20, 1, 4), (2, 20, 1, 6), (1, 5, 4)], strict=True
      )
    )
    docs = np.repeat([[0, 1]], 10, axis=1).repeat(2, axis=0).astype(np.int64)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_output(q):
      out = tvq.vq_attention(
        q,
        k,
        v,
        codebook,
        mem_len=4,
        block_len=5,
        reduction="scan",
        segment_ids=docs,
        lengths=np.array([20, 13]),
      )
      return jnp.sum(out.values**2), out

    gradient, out = gradient_and_output(q)
    return gradient.astype(jnp.float32), out

  without, with_x64 = with_and_without_x64(results)
  assert_same_but_for_rounding(without, with_x64)
  assert {str(x.dtype) for x in jax.tree.leaves(with_x64)} == {"float32", "int32"}
