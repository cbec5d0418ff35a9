"""The peer: a plain Haiku transformer on `jax.nn.dot_product_attention`.

What a user would write instead: heads of width 64, rotary-free sinusoids at the input, RMS norms,
an MLP of 4 D, and whatever fused kernel the backend has for attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import layers
from tvq_haiku.ops import positions
from tvq_haiku.training import losses
from tvq_haiku.types import Batch

_HEAD_WIDTH = 64


def layers_of_equal_size(config: TransformerConfig, n_parameter: int) -> int:
  """The depth at which the peer has about as many parameters as `config`'s model."""
  per_layer = 12 * config.d_model**2
  rest = 2 * config.n_vocab * config.d_model
  return max(1, round((n_parameter - rest) / per_layer))


def make_peer(config: TransformerConfig, n_layer: int) -> hk.Transformed:
  """Tokens [B, T] -> logits [B, T, X]; the sizes of `config`, another depth."""
  D, dtype = config.d_model, config.compute_dtype
  heads = max(1, D // _HEAD_WIDTH)
  implementation = "cudnn" if jax.default_backend() == "gpu" and dtype != jnp.float32 else None

  def layer(x: jax.Array) -> jax.Array:
    normed = layers.RMSNorm(name="attention_norm")(x)
    q, k, v = (
      y.reshape(*y.shape[:2], heads, -1) for y in layers.Projection(D, D, D, name="qkv")(normed)
    )
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    x += layers.Projection(D, name="out")(mixed.reshape(x.shape))
    return x + layers.MLP(4 * D, name="mlp")(x)

  def forward(tokens: jax.Array) -> jax.Array:
    x = layers.TokenEmbedding(n_vocab=config.n_vocab, d_model=D, name="embedding")(tokens)
    x += positions.sinusoids(jnp.arange(tokens.shape[1]), width=D, lam=config.pe_lam)
    with layers.mixed_precision(config.policy):
      x = hk.layer_stack(n_layer, unroll=n_layer if n_layer <= 8 else 1, name="layers")(layer)(
        x.astype(config.policy.output_dtype)
      )
    return layers.Unembedding(config.n_vocab, name="unembedding")(layers.RMSNorm(name="norm")(x))

  return hk.transform(forward)


def make_peer_step(
  config: TransformerConfig, n_layer: int, optimizer: optax.GradientTransformation
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """(init, step): `init(rng)` gives (params, opt_state), `step(train_state, batch)` the next ones."""
  model = make_peer(config, n_layer)

  def init(rng: jax.Array) -> tuple[Any, Any]:
    params = model.init(rng, jnp.zeros((1, 1), jnp.int32))
    return params, optimizer.init(params)

  def step(train_state: tuple[Any, Any], batch: Batch):
    params, opt_state = train_state

    def loss(params: Any) -> jax.Array:
      logits = model.apply(params, None, batch["inputs"])
      return jnp.mean(losses.token_nll(logits, batch["targets"]))

    value, gradients = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value

  return init, step


def forward_multiply_adds(config: TransformerConfig, n_layer: int, seq_len: int) -> int:
  """As in `tvq_haiku.flops`; pairs that are not masked."""
  D = config.d_model
  pairs = seq_len * (seq_len + 1) // 2
  return n_layer * (12 * D * D * seq_len + 2 * D * pairs) + seq_len * D * config.n_vocab
