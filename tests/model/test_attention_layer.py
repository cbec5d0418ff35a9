"""The recurrence over blocks: it is an hk.scan in the model, and a lax.scan outside of Haiku."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq

import helpers

pytestmark = pytest.mark.slow

LENGTH = 40  # 5 blocks


def forward_and_gradient(config):
  """Returns loss, logits and gradients of a training pass, and the size of the program."""
  model = tvq.make_transformer(config)

  def loss(params, tokens, rng):
    out = model.apply(
      params, rng, tokens, tvq.initial_state(config, tokens.shape[0]), is_training=True
    )
    return jnp.sum(jnp.sin(out.logits)) + out.commit_loss, out.logits

  arguments = (
    helpers.random_params(config),
    helpers.random_tokens(config, 2, LENGTH),
    jax.random.key(1),
  )
  function = jax.value_and_grad(loss, has_aux=True)
  compiled = jax.jit(function).lower(*arguments).compile()
  return compiled(*arguments), compiled.as_text().count(" = ")


@pytest.mark.parametrize("reduction", ["scan", "serial"])
def test_the_model_uses_hk_scan_and_gets_the_results_of_lax_scan(reduction, monkeypatch):
  config = helpers.tiny(
    head_type="mqa", n_head=2, d_v=8, reduction=reduction, p_dropres=0.2, p_dropsin=0.1
  )
  calls = []
  haiku_scan = hk.scan

  def counted_scan(*args, **kwargs):
    calls.append(args)
    return haiku_scan(*args, **kwargs)

  monkeypatch.setattr(hk, "scan", counted_scan)
  with_haiku, size_with_haiku = forward_and_gradient(config)
  assert len(calls) >= 1
  monkeypatch.setattr(hk, "scan", jax.lax.scan)
  with_lax, size_with_lax = forward_and_gradient(config)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), with_haiku, with_lax)
  assert size_with_haiku == size_with_lax


def test_vq_attention_outside_of_haiku_does_not_use_its_scan(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("hk.scan was called")

  monkeypatch.setattr(hk, "scan", refuse)
  q = jax.random.normal(jax.random.key(0), (1, 12, 1, 4))
  codebook = jax.random.normal(jax.random.key(1), (1, 8, 4))
  for reduction in ("scan", "serial"):
    out = tvq.vq_attention(q, q, q, codebook, block_len=3, mem_len=2, reduction=reduction)
    assert out.values.shape == q.shape
