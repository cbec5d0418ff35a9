"""A plain Haiku transformer with `jax.nn.dot_product_attention`, as a baseline of training speed.

It represents a model that a user would write without this library: heads of width 64, sinusoidal
positions at the input, RMSNorm, an MLP of width 4·D, and the fused attention kernel of the backend,
if there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import optax

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import layers
from tvq_haiku.ops import positions
from tvq_haiku.training import losses
from tvq_haiku.types import Array, Batch, OptState, Params

_HEAD_WIDTH = 64

PeerState = tuple[Params, OptState]


def layers_of_equal_size(config: TransformerConfig, n_param: int) -> int:
  """Returns the number of layers that gives the plain transformer about `n_param` parameters."""
  per_layer = 12 * config.d_model**2
  embeddings = 2 * config.n_vocab * config.d_model
  return max(1, round((n_param - embeddings) / per_layer))


def make_peer(config: TransformerConfig, n_layer: int) -> hk.Transformed:
  """Returns the plain transformer, which maps tokens [B, T] to logits [B, T, X].

  Args:
    config: model width, vocabulary size and precision.
    n_layer: number of layers.
  """
  D, dtype = config.d_model, config.compute_dtype
  n_head = max(1, D // _HEAD_WIDTH)
  implementation = "cudnn" if jax.default_backend() == "gpu" and dtype != jnp.float32 else None

  def layer(x: Array) -> Array:
    normed = layers.RMSNorm(name="attention_norm")(x)
    q, k, v = (
      y.reshape(*y.shape[:2], n_head, -1) for y in layers.Projection(D, D, D, name="qkv")(normed)
    )
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    x += layers.Projection(D, name="out")(mixed.reshape(x.shape))
    return x + layers.MLP(4 * D, name="mlp")(x)

  def forward(tokens: Array) -> Array:
    chex.assert_rank(tokens, 2)
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
) -> tuple[Callable[[Array], PeerState], Callable[[PeerState, Batch], tuple[PeerState, Array]]]:
  """Returns functions that initialize and train the plain transformer.

  Args:
    config: model width, vocabulary size and precision.
    n_layer: number of layers.
    optimizer: the optimizer.

  Returns:
    `init(rng)`, which returns the initial state (parameters and optimizer state), and
    `step(state, batch)`, which returns the next state and the loss in nats per token.
  """
  model = make_peer(config, n_layer)

  def init(rng: Array) -> PeerState:
    params = model.init(rng, jnp.zeros((1, 1), jnp.int32))
    return params, optimizer.init(params)

  def step(state: PeerState, batch: Batch) -> tuple[PeerState, Array]:
    params, opt_state = state

    def loss(params: Params) -> Array:
      logits = model.apply(params, None, batch["inputs"])
      return jnp.mean(losses.token_nll(logits, batch["targets"]))

    value, gradients = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value

  return init, step


def forward_multiply_adds(config: TransformerConfig, n_layer: int, seq_len: int) -> int:
  """Returns the multiply-adds of a forward pass over one sequence.

  The rules are those of `tvq_haiku.evaluation.flops` for full attention: masked scores are not
  counted.

  Args:
    config: model width and vocabulary size.
    n_layer: number of layers.
    seq_len: number of tokens T.
  """
  D = config.d_model
  n_pair = seq_len * (seq_len + 1) // 2
  return n_layer * (12 * D * D * seq_len + 2 * D * n_pair) + seq_len * D * config.n_vocab
