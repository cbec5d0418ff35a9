"""Conversion to and from the parameter names of the paper's code."""

import jax
import numpy as np
import pytest

import tvq_haiku as tvq

import helpers
from helpers import assert_same

GOLDEN = ["enwik8_like", "imagenet_like", "heads_long_memory"]


def nest(flat):
  """Returns nested dicts for a flat dict with keys such as 'a/b/c'."""
  tree = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("form", ["flat", "nested", "wrapped"])
def test_official_parameters_round_trip(name, form):
  arrays, config = helpers.golden(name)
  official = helpers.subtree(arrays, "params")
  tree = {"flat": official, "nested": nest(official), "wrapped": {"params": nest(official)}}[form]
  params = tvq.interop.params_from_official(tree, config)
  assert jax.tree.structure(params) == jax.tree.structure(tvq.params_shapes(config))
  back = tvq.interop.params_to_official(params, config)
  assert back.keys() == official.keys()
  for path, value in official.items():
    np.testing.assert_array_equal(back[path], value, err_msg=path)


def test_params_round_trip_through_main():
  config = tvq.TransformerConfig.tiny(n_head=2, n_layer=3, pe_abs=True, e_tie=True, e_preln=True)
  params = helpers.random_params(config)
  official = tvq.interop.params_to_official(params, config)
  assert_same(tvq.interop.params_from_official(official, config), params)


@pytest.mark.parametrize("name", [name for name in helpers.VARIANTS if "hybrid" not in name])
def test_params_round_trip_through_optimized(name):
  config = helpers.tiny(**helpers.VARIANTS[name])
  params = helpers.random_params(config)
  official = tvq.interop.params_to_official(params, config, layout="optimized")
  back = tvq.interop.params_from_official(official, config)
  for module, leaves in params.items():
    for leaf, value in leaves.items():
      constant = {"gain": 1.0, "offset": 0.0, "output_bias": 0.0}.get(leaf)
      expected = value if constant is None else np.full(value.shape, constant)
      np.testing.assert_allclose(
        back[module][leaf], expected, rtol=1e-6, err_msg=f"{module}/{leaf}"
      )


@pytest.mark.parametrize("layout", ["main", "optimized"])
def test_shapes_are_converted_like_arrays(layout):
  config = tvq.TransformerConfig.tiny(n_layer=2)
  arrays = tvq.interop.params_to_official(helpers.random_params(config), config, layout=layout)
  shapes = tvq.interop.params_to_official(tvq.params_shapes(config), config, layout=layout)
  assert {path: x.shape for path, x in shapes.items()} == {
    path: x.shape for path, x in arrays.items()
  }


def test_fused_kernel_is_split_in_the_order_of_keys_values_and_gates():
  config = tvq.TransformerConfig.tiny(d_k=4, d_v=6, n_layer=2)
  params = helpers.random_params(config)
  official = tvq.interop.params_to_official(params, config, layout="optimized")
  kernel = params["transformer/layers/attention_2/kvg"]["kernel"]
  for letter, columns in (("k", slice(0, 4)), ("v", slice(4, 10)), ("g", slice(10, 16))):
    path = f"stack/VQAttention_1/qkvg_producer/{letter}_proj/kernel"
    assert_same(official[path], kernel[:, None, :, columns])


def test_optimized_bias_is_scaled():
  config = tvq.TransformerConfig.tiny(e_scale=0.5)
  params = helpers.random_params(config)
  official = tvq.interop.params_to_official(params, config, layout="optimized")
  assert_same(official["out_proj/bias"], params["transformer/unembedding"]["bias"] * 0.5)


def test_all_wrong_and_missing_official_parameters_are_named():
  arrays, config = helpers.golden("enwik8_like")
  official = helpers.subtree(arrays, "params")
  del official["out_proj/bias"]
  official["extra/leaf"] = np.zeros(3)
  official["transformer_layers_1/scanned_attn2/u"] = np.zeros(9)
  with pytest.raises(ValueError) as error:
    tvq.interop.params_from_official(official, config)
  assert str(error.value) == (
    "the official parameters do not fit this config: missing out_proj/bias; unknown extra/leaf; "
    "transformer_layers_1/scanned_attn2/u has shape (9,), expected (8,)."
  )


@pytest.mark.parametrize(
  "value, message",
  [(None, "is missing, expected shape"), (np.zeros((2, 3)), r"has shape \(2, 3\), expected shape")],
)
@pytest.mark.parametrize("name", ["layers/attention_1/u", "unembedding/kernel"])
def test_wrong_and_missing_params_are_named(name, value, message):
  config = tvq.TransformerConfig.tiny()
  params = {module: dict(leaves) for module, leaves in helpers.random_params(config).items()}
  module, _, leaf = f"transformer/{name}".rpartition("/")
  params[module].pop(leaf)
  if value is not None:
    params[module][leaf] = value
  with pytest.raises(ValueError, match=f"do not fit this config: transformer/{name} {message}"):
    tvq.interop.params_to_official(params, config)


def test_unknown_layout_is_refused():
  config = tvq.TransformerConfig.tiny()
  with pytest.raises(ValueError, match="layout='jax' must be 'main' or 'optimized'"):
    tvq.interop.params_to_official(tvq.params_shapes(config), config, layout="jax")


@pytest.mark.parametrize("changes", [dict(head_type="mha"), dict(attn_type="full")])
def test_main_supports_gated_quantized_attention_only(changes):
  config = tvq.TransformerConfig.tiny(**changes)
  with pytest.raises(ValueError, match=r"attn_type='vq' only.* Use the layout 'optimized'"):
    tvq.interop.params_to_official(tvq.params_shapes(config), config)


@pytest.mark.parametrize("layout", ["main", "optimized"])
@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(attn_type=("vq", "full")), r"attn_type='vq'.* only, not .*\('vq', 'full'\)\.$"),
    (dict(attn_type="window"), r"attn_type='vq'.* only, not .*'window'\.$"),
    (dict(no_emb=True), "no_emb=True: only parameters of models that read tokens"),
  ],
)
def test_models_that_the_papers_code_lacks_are_refused(changes, message, layout):
  config = tvq.TransformerConfig.tiny(**changes)
  with pytest.raises(ValueError, match=message):
    tvq.interop.params_to_official(tvq.params_shapes(config), config, layout=layout)
