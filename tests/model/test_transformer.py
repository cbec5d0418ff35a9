"""The model: invariants, dropout and dtypes."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import layers

import helpers
from helpers import VARIANTS, apply, tiny

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", VARIANTS)
def test_windows_and_single_tokens_give_the_logits_and_state_of_one_call(name):
  config = tiny(**VARIANTS[name])
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 2, 53)
  one_call = apply(params, config, tokens)
  first = apply(params, config, tokens[:, :30])
  second = apply(params, config, tokens[:, 30:], first.state)
  windows = jnp.concatenate([first.logits, second.logits], axis=1)
  np.testing.assert_allclose(windows, one_call.logits, atol=2e-5)
  helpers.assert_trees_close(second.state, one_call.state)

  @jax.jit
  def read_single_tokens(state, tokens):
    def step(state, token):
      out = tvq.make_transformer(config).apply(params, None, token[:, None], state)
      return out.state, out.logits[:, 0]

    return jax.lax.scan(step, state, tokens.T)

  state, logits = read_single_tokens(first.state, tokens[:, 30:])
  np.testing.assert_allclose(logits.swapaxes(0, 1), one_call.logits[:, 30:], atol=2e-5)
  helpers.assert_trees_close(state, one_call.state)
  _, logits = read_single_tokens(tvq.initial_state(config, 2), tokens[:, :23])
  np.testing.assert_allclose(logits.swapaxes(0, 1), one_call.logits[:, :23], atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "mha", "full", "encoder"])
def test_without_a_state_the_model_starts_from_the_initial_state(name):
  config = tiny(causal=False) if name == "encoder" else tiny(**VARIANTS[name])
  params, tokens = helpers.random_params(config), helpers.random_tokens(config, 2, 20)
  model = tvq.make_transformer(config)
  with_state = model.apply(params, None, tokens, tvq.initial_state(config, 2))
  without = model.apply(params, None, tokens)
  helpers.assert_same(without, with_state)
  helpers.assert_same(
    jax.tree.map(jnp.shape, model.init(jax.random.key(0), tokens)), jax.tree.map(jnp.shape, params)
  )


def test_logprobs_are_normalized_logits():
  config = tiny()
  out = apply(helpers.random_params(config), config, helpers.random_tokens(config, 2, 7))
  total = jnp.exp(out.logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(out.logprobs, jnp.log(jnp.exp(out.logits) / total), atol=1e-5)
  assert out.logprobs.dtype == jnp.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "absolute"])
def test_hidden_is_the_input_of_the_output_projection(name, precision):
  config = tiny(**VARIANTS[name], precision=precision)
  params = helpers.random_params(config)
  out = apply(params, config, helpers.random_tokens(config, 2, 7))
  assert out.hidden.shape == (2, 7, config.d_model) and out.hidden.dtype == config.compute_dtype
  if config.e_tie:
    kernel = params["transformer/embedding"]["embeddings"].T
    bias = params["transformer/embedding"]["output_bias"]
  else:
    kernel, bias = (params["transformer/unembedding"][n] for n in ("kernel", "bias"))
  logits = (out.hidden.astype(jnp.float32) @ kernel + bias) * config.e_scale
  atol = 1e-5 if precision == "float32" else 0.1
  np.testing.assert_allclose(out.logits, logits, atol=atol)


@pytest.mark.parametrize(
  "name", ["absolute", "no cache", "single tokens", "assoc_scan", "grouped", "mqa", "full"]
)
def test_causality_jacobian_is_lower_triangular(name):
  # Without a cache, a token does not depend on tokens that are farther than mem_len.
  config, length = tiny(**VARIANTS[name]), 8 if name == "no cache" else 12
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 1, length)

  def projected_logits(embedded):
    """Returns one number per position, as a function of the embedded tokens [T, D]."""

    def replace_embedding(call, args, kwargs, context):
      if isinstance(context.module, layers.TokenEmbedding) and context.method_name == "__call__":
        return embedded[None]
      return call(*args, **kwargs)

    def forward():
      with hk.intercept_methods(replace_embedding):
        return tvq.Transformer(config)(tokens, tvq.initial_state(config, 1)).logits

    return hk.transform(forward).apply(params, None)[0] @ jnp.cos(jnp.arange(config.n_vocab))

  embedded = params["transformer/embedding"]["embeddings"][tokens[0]]
  influence = jnp.abs(jax.jit(jax.jacrev(projected_logits))(embedded)).sum(-1)
  assert float(jnp.triu(influence, 1).max()) == 0.0
  assert float(influence[jnp.tril_indices(length)].min()) > 0.0


def training_loss(params, config, batch, state=None):
  state = tvq.initial_state(config, batch["inputs"].shape[0]) if state is None else state
  return tvq.training_loss(params, config, None, batch, state)[0]


def test_codebook_gradient_is_one_step_of_the_moving_average():
  config = tiny(n_layer=1, c_gamma=0.9)
  params = helpers.random_params(config)
  tokens = jnp.asarray(helpers.random_tokens(config, 2, 24))
  gradient = jax.jit(jax.grad(training_loss), static_argnums=1)
  (name,) = [module for module in params if module.endswith("attention_1/quantizer")]
  old = params[name]

  def step(loss_mask):
    batch = dict(inputs=tokens, targets=tokens, loss_mask=loss_mask)
    change = gradient(params, config, batch)[name]
    return {key: old[key] - change[key] for key in old}

  # Every token is either in the memory or counted in the cache of the state after it.
  state = apply(params, config, tokens).state.attention_1
  in_memory = jax.nn.one_hot(state.memory_codes, config.n_code).sum(-2)
  counts = (state.cache_counts + in_memory).sum(1)  # [N, G, S]
  assert float(counts.sum()) == 48
  new = step(jnp.ones((2, 24)))
  np.testing.assert_allclose(new["c_count"], 0.9 * old["c_count"] + 0.1 * counts, rtol=1e-5)
  # Sums of codes without a key only decay. The others gain n keys, each of norm K^(1/4).
  gained = jnp.linalg.norm(new["c_sum"] - 0.9 * old["c_sum"], axis=-1)
  np.testing.assert_array_equal(gained > 1e-5, counts > 0.0)
  assert (gained <= 0.1 * counts * config.d_k**0.25 + 1e-5).all()
  # Masked tokens do not count.
  masked = step(jnp.ones((2, 24)).at[1, 20:].set(0.0))
  total = 0.9 * old["c_count"].sum() + 0.1 * 44
  np.testing.assert_allclose(masked["c_count"].sum(), total, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "absolute", "grouped", "full mha"])
def test_every_parameter_that_is_used_gets_a_gradient(name):
  config = tiny(**VARIANTS[name])
  tokens = jnp.asarray(helpers.random_tokens(config, 2, 40))
  batch = dict(inputs=tokens, targets=jnp.roll(tokens, 1, axis=1))
  gradients = jax.jit(jax.grad(training_loss), static_argnums=1)(
    helpers.random_params(config), config, batch
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    is_unused = "output_bias" in str(path) and not config.e_tie
    assert (float(jnp.abs(leaf).max()) > 0.0) != is_unused, path


@pytest.mark.parametrize("name", ["plain", "no cache", "full mha"])
def test_logits_depend_on_the_state(name):
  config = tiny(**VARIANTS[name])
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 2, 40)
  first = apply(params, config, tokens)
  second = apply(params, config, tokens, first.state)
  assert (jnp.abs(second.logits[:, 0] - first.logits[:, 0]).max(-1) > 1e-3).all()


def test_windows_share_the_masks_that_sequence_rng_seeds():
  config = tiny(n_layer=2, p_droplyr=0.5, p_dropsin=0.3)
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 4, 40)
  model = tvq.make_transformer(config)

  @jax.jit
  def train(rng, sequence_rng, tokens, state):
    return model.apply(params, rng, tokens, state, is_training=True, sequence_rng=sequence_rng)

  rngs = jax.random.split(jax.random.key(0), 3)
  start = tvq.initial_state(config, 4)
  one_call = train(rngs[0], rngs[1], tokens, start)
  first = train(rngs[0], rngs[1], tokens[:, :24], start)
  second = train(rngs[2], rngs[1], tokens[:, 24:], first.state)
  windows = jnp.concatenate([first.logits, second.logits], axis=1)
  np.testing.assert_allclose(windows, one_call.logits, atol=2e-5)
  other_sequence = train(rngs[0], rngs[2], tokens, start)
  assert float(jnp.abs(other_sequence.logits - one_call.logits).max()) > 1e-3


@pytest.mark.parametrize("rate", ["p_dropemb", "p_dropsin", "p_dropres", "p_droplyr"])
def test_each_dropout_is_reproducible_and_acts_in_training_only(rate):
  config = tiny(**{rate: 0.5})
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 2, 16)
  model = tvq.make_transformer(config)

  @functools.partial(jax.jit, static_argnums=1)
  def logits(rng, is_training):
    state = tvq.initial_state(config, 2)
    return model.apply(params, rng, tokens, state, is_training=is_training).logits

  first, second = (logits(jax.random.key(seed), True) for seed in range(2))
  np.testing.assert_array_equal(first, logits(jax.random.key(0), True))
  assert float(jnp.abs(first - second).max()) > 1e-3
  without_dropout = logits(jax.random.key(0), False)
  np.testing.assert_array_equal(without_dropout, logits(jax.random.key(1), False))
  expected = apply(params, config.replace(**{rate: 0.0}), tokens).logits
  np.testing.assert_allclose(without_dropout, expected, atol=2e-5)


def test_bfloat16_training_is_finite_and_keeps_parameters_in_float32():
  config = tiny(precision="bfloat16")
  train_cfg = tvq.TrainConfig(
    n_warmup_step=0, n_max_step=10, sequence_len=32, update_len=16, global_batch_size=2
  )
  state = tvq.init_train_state(config, train_cfg, jax.random.key(0))
  before = jax.tree.map(lambda x: x.dtype, state.params)
  step = tvq.make_train_step(config, train_cfg)
  tokens = helpers.random_tokens(config, 2, 32)
  state, metrics = step(state, dict(inputs=tokens, targets=tokens), jax.random.key(0))
  assert int(state.step) == 2
  assert all(np.isfinite(value).all() for value in metrics.values())
  assert jax.tree.map(lambda x: x.dtype, state.params) == before
  assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}
  out = apply(state.params, config, tokens)
  assert out.logits.dtype == jnp.float32
  assert out.state.attention_1.memory_values.dtype == jnp.bfloat16
  exact = apply(state.params, config.replace(precision="float32"), tokens)
  assert 1e-6 < float(jnp.abs(out.logits - exact.logits).max()) < 0.2


def test_policy_sets_the_dtypes_of_activations_but_not_of_counts_codebook_and_logits():
  config = tiny(precision="params=float32,compute=bfloat16,output=float32")
  state = tvq.initial_state(config, 2)
  out = jax.eval_shape(
    tvq.make_transformer(config).apply,
    tvq.params_shapes(config),
    None,
    jnp.zeros((2, 5), jnp.int32),
    state,
  )
  expected = dict(
    memory_keys="float32",
    memory_values="bfloat16",
    cache_counts="float32",
    cache_means="float32",
  )
  for attention in (state.attention_1, out.state.attention_1):
    assert {name: str(getattr(attention, name).dtype) for name in expected} == expected
  assert out.logits.dtype == jnp.float32


def test_bfloat16_counts_stay_exact_past_256():
  config = tiny(precision="bfloat16", n_layer=1)
  params = helpers.random_params(config)
  state = apply(params, config, np.full((1, 700), 3, np.int32)).state
  for _ in range(3):
    state = apply(params, config, np.full((1, 1), 3, np.int32), state).state
  assert float(state.attention_1.cache_counts.max()) == 703 - config.mem_len


def test_encoder_attends_to_both_sides_and_returns_its_state_unchanged():
  config, length = tiny(causal=False, mem_len=3, block_len=4, pe_abs=True), 21
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 2, length)
  state = tvq.initial_state(config, 2)
  out = apply(params, config, tokens)
  jax.tree.map(np.testing.assert_array_equal, out.state, state)
  for index in (0, length - 1):
    changed = tokens.copy()
    changed[0, index] = (tokens[0, index] + 1) % config.n_vocab
    differs = np.abs(apply(params, config, changed).logits - out.logits).max(-1) > 0
    assert differs[0].all() and not differs[1].any()
  # Documents and padding are separated as in a causal model.
  doc_ids = np.repeat([0, 1, -1], [9, 10, 2])[None].astype(np.int32)
  packed = apply(params, config, tokens[:1], doc_ids=doc_ids)
  for document in (0, 1):
    selected = doc_ids[0] == document
    alone = apply(params, config, tokens[:1, selected])
    np.testing.assert_allclose(packed.logits[0, selected], alone.logits[0], atol=2e-5)


def test_size_of_the_program_does_not_depend_on_the_number_of_layers():
  def count_equations(n_layer):
    config = tiny(n_layer=n_layer)
    state = jax.eval_shape(lambda: tvq.initial_state(config, 1))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    jaxpr = jax.make_jaxpr(tvq.make_transformer(config).apply)(
      tvq.params_shapes(config), None, tokens, state
    )
    return str(jaxpr).count(" = ")

  assert count_equations(2) == count_equations(24)


def test_the_model_can_be_used_inside_another_haiku_transform():
  config = tiny()

  def classify(tokens):
    out = tvq.Transformer(config)(tokens, tvq.initial_state(config, tokens.shape[0]))
    return hk.Linear(2)(out.logits[:, -1])

  model = hk.transform(classify)
  tokens = jnp.asarray(helpers.random_tokens(config, 3, 10))
  params = model.init(jax.random.key(0), tokens)
  assert model.apply(params, None, tokens).shape == (3, 2)
