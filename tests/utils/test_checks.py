"""Argument checks: errors name the argument, the expected value and the value passed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.utils import checks

import helpers
from helpers import apply, tiny


class TestArrays:
  def test_a_letter_has_the_same_size_in_all_arrays(self):
    dims = chex.Dimensions(K=3)
    checks.check_arrays(
      "f", dims, q=(jnp.ones((2, 3)), "TK", jnp.floating), k=(None, "TV", jnp.floating)
    )
    assert (dims.T, dims.K) == (2, 3)
    with pytest.raises(
      ValueError, match=r"f: k must have shape \[T=2, K\+2=5, V\], got \(2, 4, 1\)\."
    ):
      axes = ("T", ("K+2", 5), "V")
      checks.check_arrays("f", dims, k=(jnp.ones((2, 4, 1)), axes, jnp.floating))

  def test_anything_but_an_array_is_refused(self):
    with pytest.raises(TypeError, match=r"f: x must be an array, got list\."):
      checks.check_arrays("f", chex.Dimensions(), x=([[1.0]], "BT", jnp.floating))

  def test_dtype(self):
    with pytest.raises(TypeError, match=r"f: docs must be integer, got float32\."):
      checks.check_arrays("f", chex.Dimensions(), docs=(jnp.ones((2, 3)), "BT", jnp.integer))

  def test_tracers_and_numpy_arrays_pass(self):
    def function(x):
      checks.check_arrays("f", chex.Dimensions(), x=(x, "BT", jnp.floating))
      return x

    x = np.ones((2, 3), np.float32)
    assert function(x) is x and jax.eval_shape(function, x).shape == (2, 3)


def test_heads():
  checks.check_heads("f", 4, 2)
  with pytest.raises(ValueError, match="f: 4 query heads cannot share 3 key/value heads evenly"):
    checks.check_heads("f", 4, 3)


class TestTokens:
  def test_values_are_not_checked_under_jit(self):
    checked = jax.jit(lambda tokens: checks.check_tokens(tokens, 5) or tokens)
    assert checked(jnp.full((1, 2), 9)).tolist() == [[9, 9]]

  def test_anything_without_a_shape_is_refused(self):
    with pytest.raises(TypeError, match=r"tokens must be an array, got list\."):
      checks.check_tokens([[1, 2]], 5)

  def test_the_values_of_all_shards_are_checked(self):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    tokens = jax.device_put(np.array([[1], [9]], np.int32), sharding)
    checks.check_tokens(tokens, 10)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 9\), got 1...9\."):
      checks.check_tokens(tokens, 9)


class TestBatch:
  tokens = np.zeros((2, 3), np.int32)

  def test_complete_batches_pass(self):
    batch = dict(inputs=self.tokens, targets=self.tokens)
    checks.check_batch(batch, (2, 3), 5)
    checks.check_batch(batch | dict(doc_ids=self.tokens, loss_mask=self.tokens), (2, 3), 5)

  @pytest.mark.parametrize(
    "changes, error, message",
    [
      ({"targets": None}, ValueError, r"batch lacks 'targets'; it has \['inputs'\]"),
      ({"mask": tokens}, ValueError, r"batch has unknown keys \['mask'\]"),
      ({"doc_ids": tokens[:1]}, ValueError, r"batch\['doc_ids'\] must have shape \(2, 3\)"),
      ({"inputs": tokens + 5}, ValueError, r"batch\['inputs'\]: tokens must lie in \[0, 5\)"),
      ({"loss_mask": [1.0]}, TypeError, r"batch\['loss_mask'\] must be an array, got list"),
      ({"inputs": tokens + 0.5}, TypeError, r"batch\['inputs'\]: tokens must be integers"),
    ],
  )
  def test_wrong_keys_are_named(self, changes, error, message):
    batch = dict(inputs=self.tokens, targets=self.tokens) | changes
    batch = {key: value for key, value in batch.items() if value is not None}
    with pytest.raises(error, match=message):
      checks.check_batch(batch, (2, 3), 5)


class TestArgumentsOfTheModel:
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
  def test_wrong_tokens(self, tokens, message):
    with pytest.raises((TypeError, ValueError), match=message):
      self.call(tokens)

  def test_out_of_range_tokens_under_jit_give_nan_logits(self):
    for token in (11, -1):
      tokens = jnp.full((1, 5), token)
      assert jnp.isnan(apply(helpers.random_params(self.config), self.config, tokens).logits).all()

  @pytest.mark.parametrize(
    "other, batch_size, field",
    [
      (tiny(n_code=7), 2, "cache_counts"),
      (tiny(mem_len=4), 2, "memory_codes"),
      (tiny(n_layer=2), 2, "position"),
      (tiny(), 3, "document"),
      (tiny(precision="bfloat16"), 2, "memory_values"),
    ],
  )
  def test_state_of_a_different_config_or_batch_size(self, other, batch_size, field):
    with pytest.raises(ValueError, match=field):
      self.call(jnp.zeros((2, 5), jnp.int32), tvq.initial_state(other, batch_size))

  def test_state_of_a_different_type(self):
    with pytest.raises(ValueError, match="initial_state, got dict"):
      self.call(jnp.zeros((2, 5), jnp.int32), {"a": 1})

  @pytest.mark.parametrize("name", ["doc_ids", "loss_mask"])
  def test_masks_of_a_different_shape(self, name):
    with pytest.raises(ValueError, match=rf"{name} must have the shape \[B, T\] of the in"):
      self.call(jnp.zeros((2, 5), jnp.int32), **{name: jnp.zeros((2, 4), jnp.int32)})

  @pytest.mark.parametrize("name", ["doc_ids", "loss_mask"])
  def test_masks_must_be_arrays(self, name):
    with pytest.raises(TypeError, match=rf"{name} must be an array, got list"):
      self.call(jnp.zeros((1, 2), jnp.int32), tvq.initial_state(self.config, 1), **{name: [[0, 0]]})

  def test_doc_ids_must_be_signed(self):
    with pytest.raises(TypeError, match="doc_ids must be signed integers, got uint32"):
      self.call(jnp.zeros((2, 5), jnp.int32), doc_ids=jnp.zeros((2, 5), jnp.uint32))

  def test_batch_size_must_be_positive(self):
    with pytest.raises(ValueError, match="batch_size=0"):
      tvq.initial_state(self.config, 0)
