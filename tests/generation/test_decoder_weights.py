"""Tests of the layout of a model's parameters for decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku.generation import decoder_weights

from helpers import VARIANTS, random_params, tiny


@pytest.mark.parametrize("name", ["plain", "absolute", "mqa", "full mha"])
def test_weights_are_in_the_compute_dtype_and_statistics_in_float32(name):
  config = tiny(**VARIANTS[name], precision="bfloat16")
  weights = decoder_weights.prepare_weights(random_params(config), config)
  assert len(weights.layers) == config.n_layer
  dtypes = {
    jax.tree_util.keystr(path): x.dtype
    for path, x in jax.tree_util.tree_flatten_with_path(weights)[0]
  }
  in_compute_dtype = (".qkv", ".out", ".up", ".down", ".relative_keys", ".unembedding")
  for leaf, dtype in dtypes.items():
    assert dtype == (jnp.bfloat16 if leaf.endswith(in_compute_dtype) else jnp.float32), leaf


def test_projections_have_one_row_per_output():
  config = tiny(n_layer=2)
  params = random_params(config)
  weights = decoder_weights.prepare_weights(params, config)
  for i, layer in enumerate(weights.layers):
    kernels = [
      params[f"transformer/layers/attention_2/{name}"]["kernel"][i] for name in ("q", "kvg")
    ]
    expected = np.concatenate(kernels, axis=1).T
    np.testing.assert_array_equal(layer.attention_2.qkv, expected)
    assert layer.mlp is None
