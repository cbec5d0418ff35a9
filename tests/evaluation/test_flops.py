"""Arithmetic costs: the count agrees with the matrix products in the program of the model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.evaluation import flops

CONFIG = tvq.TransformerConfig(
  n_vocab=128,
  d_model=64,
  d_k=32,
  d_v=96,
  n_head=2,
  n_code=48,
  n_layer=2,
  block_len=64,
  mem_len=64,
  reduction="serial",
)


def counted_products(jaxpr):
  """Counts the multiply-adds of all matrix products of a program, including those in loops."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    for parameter in equation.params.values():
      for inner in parameter if isinstance(parameter, (list, tuple)) else [parameter]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          total += equation.params.get("length", 1) * counted_products(inner)
  return total


@pytest.mark.parametrize(
  "changes",
  [
    {},
    dict(n_head=4, n_kv_head=2),
    dict(head_type="mha"),
    dict(head_type="mqa"),
    dict(agg_cache=False),
    dict(causal=False),
  ],
)
def test_count_agrees_with_the_program(changes):
  config, T = CONFIG.replace(**changes), 512
  params, state = tvq.params_shapes(config), jax.eval_shape(lambda: tvq.initial_state(config, 1))
  tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
  apply = lambda params, *arguments: tvq.make_transformer(config).apply(params, None, *arguments)
  program = counted_products(jax.make_jaxpr(apply)(params, tokens, state).jaxpr)
  # Sums of values by code are products in the program, but only additions in the count.
  n_attention = (2 if config.gated else 1) * config.n_layer
  n_side = 1 if config.causal else 2
  sums = n_attention * n_side * T * config.kv_heads * config.n_code * config.d_v
  assert program == flops.forward_multiply_adds(config, T) + sums


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mem_len", [20, 600])
def test_full_attention_counts_pairs_that_are_not_masked(causal, mem_len):
  config = CONFIG.replace(attn_type="full", head_type="mqa", causal=causal, mem_len=mem_len)
  c, T = config, 512
  projections = c.d_model * (c.n_head * (c.d_k + c.d_v) + c.d_k + c.d_v)
  mlp = 2 * c.d_model * c.mlp_width
  distances = mem_len + 1 if causal else 2 * mem_len + 1
  i, j = np.mgrid[:T, :T]
  pairs = ((j <= i) & (i - j <= mem_len)).sum() if causal else T * T
  layer = T * (projections + mlp) + distances * c.d_model * c.d_k
  layer += pairs * c.n_head * (2 * c.d_k + c.d_v)  # content score, position score, value
  expected = c.n_layer * layer + T * c.d_model * c.n_vocab
  assert flops.forward_multiply_adds(config, T) == expected


def test_count_of_a_hybrid_is_the_mean_of_its_parts():
  hybrid = CONFIG.replace(attn_type=("vq", "full"), full_len=300)
  parts = [hybrid.replace(attn_type=name) for name in hybrid.attn_type]
  total = sum(flops.forward_multiply_adds(config, 512) for config in parts)
  assert 2 * flops.forward_multiply_adds(hybrid, 512) == total


def test_training_takes_six_flops_per_multiply_add():
  assert flops.training_flops(CONFIG, 512) == 6 * (flops.forward_multiply_adds(CONFIG, 512) // 512)
