"""Parameters of the paper's code: in and out without loss, and errors that name leaves."""

import jax
import numpy as np
import pytest

import tvq_haiku as tvq

import helpers

GOLDEN = ["enwik8_like", "imagenet_like", "heads_long_memory"]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("form", ["flat", "nested", "wrapped"])
def test_in_and_out_without_loss(name, form):
  arrays, config = helpers.golden(name)
  theirs = helpers.subtree(arrays, "params")
  tree = theirs
  if form != "flat":
    tree = {}
    for key, value in theirs.items():
      *path, leaf = key.split("/")
      node = tree
      for part in path:
        node = node.setdefault(part, {})
      node[leaf] = value
  if form == "wrapped":
    tree = {"params": tree}
  ours = tvq.interop.params_from_official(tree, config)
  assert jax.tree.structure(ours) == jax.tree.structure(tvq.params_shapes(config))
  back = tvq.interop.params_to_official(ours, config)
  assert back.keys() == theirs.keys()
  for key, value in theirs.items():
    np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_out_and_in_without_loss():
  config = tvq.TransformerConfig.tiny(n_head=2, n_layer=3, pe_abs=True, e_tie=True, e_preln=True)
  params = helpers.random_params(config)
  there = tvq.interop.params_to_official(params, config)
  jax.tree.map(
    np.testing.assert_array_equal, tvq.interop.params_from_official(there, config), params
  )


def test_wrong_and_missing_leaves_are_named():
  arrays, config = helpers.golden("enwik8_like")
  theirs = helpers.subtree(arrays, "params")
  del theirs["out_proj/bias"]
  theirs["extra/leaf"] = np.zeros(3)
  theirs["transformer_layers_1/scanned_attn2/u"] = np.zeros(9)
  with pytest.raises(ValueError) as error:
    tvq.interop.params_from_official(theirs, config)
  for part in (
    "missing out_proj/bias",
    "unknown extra/leaf",
    "transformer_layers_1/scanned_attn2/u has shape (9,), expected (8,)",
  ):
    assert part in str(error.value)


def test_our_own_wrong_leaves_are_named():
  config = tvq.TransformerConfig.tiny()
  params = helpers.random_params(config)
  with pytest.raises(ValueError, match="transformer/layers/attention_1/u has shape"):
    bad = {
      **params,
      "transformer/layers/attention_1": {
        **params["transformer/layers/attention_1"],
        "u": np.zeros((2, 3)),
      },
    }
    tvq.interop.params_to_official(bad, config)
  with pytest.raises(ValueError, match="lack transformer/unembedding/kernel"):
    tvq.interop.params_to_official(
      {**params, "transformer/unembedding": {"bias": params["transformer/unembedding"]["bias"]}},
      config,
    )
  with pytest.raises(ValueError, match="layout='jax' must be 'main' or 'optimized'"):
    tvq.interop.params_to_official(params, config, layout="jax")


@pytest.mark.parametrize("name", helpers.VARIANTS)
def test_optimized_layout_in_and_out(name):
  config = helpers.tiny(**helpers.VARIANTS[name])
  params = helpers.random_params(config)
  there = tvq.interop.params_to_official(params, config, layout="optimized")
  back = tvq.interop.params_from_official(there, config)
  for module, leaves in params.items():
    for leaf, value in leaves.items():
      filler = {"gain": 1.0, "offset": 0.0, "output_bias": 0.0}.get(leaf)
      want = value if filler is None else np.full(value.shape, filler)
      np.testing.assert_allclose(back[module][leaf], want, rtol=1e-6, err_msg=f"{module}/{leaf}")


def test_main_layout_has_gated_quantized_heads_only():
  for changes in (dict(head_type="mha"), dict(attn_type="full")):
    config = tvq.TransformerConfig.tiny(**changes)
    with pytest.raises(ValueError, match="head_type='shga' and attn_type='vq' only"):
      tvq.interop.params_to_official(helpers.random_params(config), config)
