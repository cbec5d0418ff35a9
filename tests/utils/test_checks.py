"""Wrong tokens, masks and states are named."""

import jax
import jax.numpy as jnp
import pytest

import tvq_haiku as tvq

import helpers
from helpers import apply, tiny


class TestBadInput:
  config = tiny()

  def call(self, tokens, state=None, **kwargs):
    state = tvq.initial_state(self.config, 2) if state is None else state
    apply = tvq.make_transformer(self.config).apply
    return jax.eval_shape(
      lambda params: apply(params, None, tokens, state, **kwargs), tvq.params_shapes(self.config)
    )

  @pytest.mark.parametrize(
    "tokens, message",
    [
      (jnp.full((2, 5), 11), r"\[0, 11\), got 11...11"),
      (jnp.full((2, 5), -1), "got -1"),
      (jnp.zeros((2, 5)), "integers, got float32"),
      (jnp.zeros((5,), jnp.int32), r"shape \(5,\)"),
      (jnp.zeros((2, 0), jnp.int32), r"shape \(2, 0\)"),
    ],
  )
  def test_tokens(self, tokens, message):
    with pytest.raises((TypeError, ValueError), match=message):
      self.call(tokens)

  def test_out_of_range_tokens_under_jit_become_nan(self):
    for token in (11, -1):
      tokens = jnp.full((1, 5), token)
      assert jnp.isnan(apply(self.config, helpers.random_params(self.config), tokens).logits).all()

  @pytest.mark.parametrize(
    "other, batch, field",
    [
      (tiny(n_code=7), 2, "cache_counts"),
      (tiny(mem_len=4), 2, "memory_codes"),
      (tiny(n_layer=2), 2, "position"),
      (tiny(), 3, "document"),
      (tiny(precision="bfloat16"), 2, "memory_values"),
    ],
  )
  def test_state_of_another_config_or_batch(self, other, batch, field):
    with pytest.raises(ValueError, match=field):
      self.call(jnp.zeros((2, 5), jnp.int32), tvq.initial_state(other, batch))

  def test_state_of_another_kind(self):
    with pytest.raises(ValueError, match="initial_state, got dict"):
      self.call(jnp.zeros((2, 5), jnp.int32), {"a": 1})

  @pytest.mark.parametrize("name", ["doc_ids", "loss_mask"])
  def test_masks_of_another_shape(self, name):
    with pytest.raises(ValueError, match=rf"{name} must have the shape of tokens, \(2, 5\)"):
      self.call(jnp.zeros((2, 5), jnp.int32), **{name: jnp.zeros((2, 4), jnp.int32)})

  def test_batch_size(self):
    with pytest.raises(ValueError, match="batch_size=0"):
      tvq.initial_state(self.config, 0)
