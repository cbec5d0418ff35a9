"""Checks, for public functions, that a model can predict tokens."""

from __future__ import annotations

from collections.abc import Mapping

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import parameters
from tvq_haiku.types import Params
from tvq_haiku.utils import value_checks


def check_causal(caller: str, config: TransformerConfig) -> None:
  """Checks that a model predicts the next token.

  Args:
    caller: name of the function, for the message.
    config: the configuration that was passed.

  Raises:
    TypeError: `config` is not a configuration of a model.
    ValueError: the model is an encoder.

  >>> check_causal("f", TransformerConfig.tiny(causal=False))
  Traceback (most recent call last):
  ValueError: f: causal=False: an encoder cannot predict the next token, because it attends to ...
  """
  if not isinstance(config, TransformerConfig):
    raise TypeError(
      f"{caller}: config must be a TransformerConfig, got {type(config).__name__}. Arguments come "
      "in the order (params, config, ...)."
    )
  if not config.causal:
    raise ValueError(
      f"{caller}: causal=False: an encoder cannot predict the next token, because it attends to "
      "later tokens, too. Use a causal model."
    )


def check_reads_tokens(caller: str, config: TransformerConfig) -> None:
  """Checks that a model reads tokens and predicts the next one.

  Args:
    caller: name of the function, for the message.
    config: the configuration that was passed.

  Raises:
    TypeError: `config` is not a configuration of a model.
    ValueError: the model is an encoder, or it reads features.
  """
  check_causal(caller, config)
  if config.no_emb:
    raise ValueError(
      f"{caller}: no_emb=True: the model reads features, so it cannot read the tokens that it "
      "predicts. Use tvq.decode_step, or a model with embeddings."
    )


def check_language_model(caller: str, params: Params, config: TransformerConfig) -> None:
  """Checks a model that a public function runs: parameters and configuration.

  Args:
    caller: name of the function, for the message.
    params: the parameters that were passed.
    config: the configuration that was passed.

  Raises:
    TypeError: an argument has a wrong type, or the function is called inside of a transformation
      such as `jax.jit`.
    ValueError: the model does not read and predict tokens, or the parameters are not those of the
      configuration.
  """
  check_reads_tokens(caller, config)
  if not isinstance(params, Mapping) or not all(isinstance(x, Mapping) for x in params.values()):
    raise TypeError(
      f"{caller}: params must map modules to named arrays, as the `init` of tvq.make_transformer "
      f"returns them, got {type(params).__name__}."
    )
  value_checks.check_not_traced(caller, params)
  parameters.check_params(params, config)
