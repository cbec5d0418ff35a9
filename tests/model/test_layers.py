"""Layers with parameters, mixed precision, and dropout."""

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from tvq_haiku.model import layers


def random_array(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def init_and_apply(function, *args):
  """Returns the parameters and the output of a function that calls Haiku modules."""
  model = hk.transform(function)
  params = model.init(jax.random.key(0), *args)
  return params, model.apply(params, None, *args)


def test_projection_of_several_widths_multiplies_by_the_parts_of_one_kernel():
  x = random_array((2, 3, 5))
  params, outputs = init_and_apply(lambda x: layers.Projection(4, 1, 2)(x), x)
  kernel = params["projection"]["kernel"]
  assert kernel.shape == (5, 7)
  np.testing.assert_allclose(jnp.concatenate(outputs, axis=-1), x @ kernel, rtol=1e-5)
  assert [output.shape[-1] for output in outputs] == [4, 1, 2]


def test_mixed_precision_casts_projections_and_nothing_else():
  policy = jmp.get_policy("params=float32,compute=bfloat16,output=bfloat16")

  def forward(x):
    with layers.mixed_precision(policy):
      projected = layers.Projection(4)(x)
      normed = layers.RMSNorm()(x)
    return projected, normed, layers.Projection(4, name="outside")(x)

  params, (projected, normed, outside) = init_and_apply(forward, random_array((2, 3, 8)))
  assert (projected.dtype, normed.dtype, outside.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm_is_computed_in_float32_and_keeps_the_dtype(dtype):
  x = (1e3 * random_array((2, 3, 8))).astype(dtype)

  def forward(x):
    return layers.RMSNorm()(x)

  model = hk.transform(forward)
  params = {"norm": {"gain": random_array((8,), 1), "offset": random_array((8,), 2)}}
  normed = model.apply(params, None, x)
  assert normed.dtype == dtype
  exact = np.asarray(x, np.float64)
  exact /= np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-6)
  exact = exact * np.asarray(params["norm"]["gain"]) + np.asarray(params["norm"]["offset"])
  np.testing.assert_allclose(
    normed.astype(jnp.float32), exact, rtol=1e-5 if dtype == jnp.float32 else 2**-8, atol=1e-5
  )


def test_mlp_squares_the_positive_part_of_its_hidden_layer():
  x = random_array((2, 3, 4))
  params, output = init_and_apply(lambda x: layers.MLP(6)(x), x)
  hidden = layers.rms_normalize(x) @ params["mlp/up"]["kernel"]
  expected = np.square(np.maximum(hidden, 0.0)) @ params["mlp/down"]["kernel"]
  np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def test_embedding_looks_rows_up_and_marks_tokens_out_of_range_with_nan():
  tokens = jnp.array([[0, 4, -1, 5]])
  params, vectors = init_and_apply(
    lambda tokens: layers.TokenEmbedding(n_vocab=5, d_model=2)(tokens), tokens
  )
  table = params["embedding"]["embeddings"]
  np.testing.assert_array_equal(vectors[0, :2], table[jnp.array([0, 4])])
  assert jnp.isnan(vectors[0, 2:]).all()


def test_both_output_projections_return_float32_logits_of_bfloat16_inputs():
  x = random_array((2, 3, 4)).astype(jnp.bfloat16)

  def forward(x):
    tied = layers.TokenEmbedding(n_vocab=5, d_model=4).logits(x)
    return tied, layers.Unembedding(5)(x)

  model = hk.transform(forward)
  params = jax.tree.map(
    lambda p: random_array(p.shape, p.size), jax.eval_shape(model.init, jax.random.key(0), x)
  )
  tied, untied = model.apply(params, None, x)
  assert tied.dtype == untied.dtype == jnp.float32
  rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
  x = x.astype(jnp.float32)
  expected = x @ rounded["embedding"]["embeddings"].T + params["embedding"]["output_bias"]
  np.testing.assert_allclose(tied, expected, rtol=1e-5, atol=1e-5)
  expected = x @ rounded["unembedding"]["kernel"] + params["unembedding"]["bias"]
  np.testing.assert_allclose(untied, expected, rtol=1e-5, atol=1e-5)


def test_dropout_per_example_drops_batch_elements_and_keeps_the_mean():
  x = jnp.ones((4000, 3, 2))
  dropped = layers.dropout(jax.random.key(0), 0.25, x, per_example=True)
  examples = dropped.reshape(4000, -1)
  is_zero, is_scaled = (examples == 0.0).all(1), jnp.isclose(examples, 1 / 0.75).all(1)
  assert (is_zero | is_scaled).all()
  assert abs(float(is_zero.mean()) - 0.25) < 0.03
  assert abs(float(dropped.mean()) - 1.0) < 0.05


def test_dropout_of_entries_keeps_dtype_and_mean():
  x = jnp.ones((100, 40), jnp.bfloat16)
  dropped = layers.dropout(jax.random.key(0), 0.5, x)
  assert dropped.dtype == jnp.bfloat16
  assert set(np.unique(dropped.astype(jnp.float32))) == {0.0, 2.0}
  assert not (dropped == dropped[:, :1]).all(1).any()  # entries are dropped independently
  assert abs(float(dropped.astype(jnp.float32).mean()) - 1.0) < 0.1
  assert layers.dropout(None, 0.0, x) is x


def test_branches_are_dropped_in_training_only():
  x, branch = random_array((64, 2, 3)), random_array((64, 2, 3), 1)

  def forward(is_training):
    return layers.add_branch(
      x, branch, p_dropres=0.0, p_droplyr=0.5, rng=jax.random.key(0), is_training=is_training
    )

  np.testing.assert_array_equal(forward(False), x + branch)
  added = forward(True) - x
  is_dropped = (added == 0.0).all((1, 2))
  assert 0 < is_dropped.sum() < 64
  np.testing.assert_allclose(added[~is_dropped], 2.0 * branch[~is_dropped], rtol=1e-5, atol=1e-6)


def test_wrong_shapes_fail_inside_the_layers():
  for function, argument in (
    (lambda x: layers.TokenEmbedding(n_vocab=5, d_model=2)(x), jnp.zeros((1, 2))),
    (lambda x: layers.TokenEmbedding(n_vocab=5, d_model=2).logits(x), jnp.zeros((1, 2, 3))),
    (lambda x: layers.Unembedding(5)(x), jnp.zeros((2, 3))),
    (lambda x: layers.Projection(5)(x), jnp.zeros((2, 3), jnp.int32)),
  ):
    with pytest.raises(AssertionError, match="assert"):
      init_and_apply(function, argument)
