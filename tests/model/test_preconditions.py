"""Conditions that a model must meet before a public function runs it."""

import jax
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import preconditions

from helpers import tiny

CONFIG = tiny()
SHAPES = tvq.params_shapes(CONFIG)


def test_a_causal_model_with_its_parameters_passes():
  preconditions.check_causal("f", CONFIG)
  preconditions.check_language_model("f", SHAPES, CONFIG)


@pytest.mark.parametrize(
  "params, config, error, message",
  [
    (SHAPES, CONFIG.replace(causal=False), ValueError, "causal=False: an encoder cannot predict"),
    (SHAPES, CONFIG.replace(no_emb=True), ValueError, "no_emb=True: the model reads features"),
    (CONFIG, SHAPES, TypeError, "config must be a TransformerConfig, got dict"),
    (
      SHAPES,
      None,
      TypeError,
      r"config must be a TransformerConfig, got NoneType.*\(params, config",
    ),
    (None, CONFIG, TypeError, "params must map modules to named arrays, .* got NoneType"),
    ({"a": 1}, CONFIG, TypeError, "params must map modules to named arrays, .* got dict"),
  ],
)
def test_other_models_are_refused(params, config, error, message):
  with pytest.raises(error, match=f"^f: {message}"):
    preconditions.check_language_model("f", params, config)


def test_parameters_of_another_model_are_refused():
  with pytest.raises(ValueError, match="params do not fit this config"):
    preconditions.check_language_model("f", SHAPES, CONFIG.replace(d_k=4))


def test_traced_parameters_are_refused():
  params = {module: dict.fromkeys(leaves, 1.0) for module, leaves in SHAPES.items()}
  with pytest.raises(TypeError, match=r"^f is not for use inside jax.jit"):
    jax.jit(lambda p: preconditions.check_language_model("f", p, CONFIG))(params)
