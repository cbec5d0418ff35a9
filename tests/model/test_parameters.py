"""Names, sizes and initial values of the parameters, and their check."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import parameters

import helpers
from helpers import VARIANTS, tiny

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
  "preset, total", [("enwik8", 187_679_750), ("imagenet64", 1_249_622_276), ("pg19", 1_314_659_584)]
)
def test_presets_have_the_parameter_totals_of_the_paper(preset, total):
  config = getattr(tvq.TransformerConfig, preset)()
  shapes = tvq.params_shapes(config)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total


def test_parameter_names_and_shapes():
  """Checkpoints and `interop` depend on the names. To regenerate the file after a change:

  PYTHONPATH=tests:tests/model python -c "import test_parameters as t; t.write_names()"
  """
  assert parameter_names() == json.loads(NAMES.read_text())


NAMES = helpers.GOLDEN / "parameters.json"


def parameter_names():
  configs = {
    "untied": tiny(n_layer=2),
    "tied": tiny(n_layer=2, **VARIANTS["absolute"]),
    "mqa": tiny(n_layer=2, **VARIANTS["mqa"]),
    "full": tiny(n_layer=2, attn_type="full"),
    "hybrid": tiny(n_layer=2, **VARIANTS["hybrid"]),
    "tied features": tiny(n_layer=2, **VARIANTS["absolute"], no_emb=True),
  }
  return {
    key: {
      f"{module}:{name}": list(leaf.shape)
      for module, leaves in sorted(tvq.params_shapes(config).items())
      for name, leaf in sorted(leaves.items())
    }
    for key, config in configs.items()
  }


def write_names():
  NAMES.write_text(json.dumps(parameter_names(), indent=1) + "\n")


def test_initial_values_of_parameters():
  config = tvq.TransformerConfig(
    n_vocab=400, d_model=64, d_k=32, d_v=96, n_code=64, pe_abs=True, e_preln=True
  )
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = jax.jit(tvq.make_transformer(config).init)(
    jax.random.key(0), tokens, tvq.initial_state(config, 1)
  )
  for module, leaves in params.items():
    for name, x in leaves.items():
      if name == "kernel":
        fan_in = x.shape[-2]
        assert abs(float(x.std()) * fan_in**0.5 - 1.0) < 0.05, module
      elif name in ("u", "v", "bias", "output_bias", "offset", "scale"):
        assert not x.any(), (module, name)
      elif name in ("gain", "c_count"):
        assert (x == 1.0).all(), (module, name)
      else:
        std = {"embeddings": 1.0, "c_sum": 64**-0.5}[name]
        assert abs(float(x.std()) / std - 1.0) < 0.05, (module, name)
        assert module.split("/")[-1] in ("embedding", "quantizer")


def test_check_params_names_the_parameter_and_both_shapes():
  config = tiny()
  shapes = tvq.params_shapes(config)
  parameters.check_params(shapes, config)
  parameters.check_params(helpers.random_params(config), config)
  name = "transformer/unembedding"
  for params, message in (
    (
      {**shapes, name: {**shapes[name], "bias": np.zeros(3)}},
      r"has shape \(3,\), expected \(11,\)",
    ),
    ({**shapes, name: {"kernel": shapes[name]["kernel"]}}, r"is missing, expected shape \(11,\)"),
  ):
    with pytest.raises(ValueError, match=f"params do not fit this config: {name}/bias {message}"):
      parameters.check_params(params, config)
  with pytest.raises(ValueError, match=r"other/bias has shape \(3,\), but this config has no such"):
    parameters.check_params({**shapes, "other": {"bias": np.zeros(3)}}, config)
