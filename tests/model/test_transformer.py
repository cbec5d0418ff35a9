"""The whole model: invariants, names, sizes, bad input."""

import json

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import layers, transformer
from tvq_haiku.model import remat as remat_lib

import helpers
from helpers import VARIANTS, apply, tiny


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_equals_windows_equals_single_tokens(name):
  config = tiny(**VARIANTS[name])
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 2, 53)
  whole = apply(config, params, tokens)
  first = apply(config, params, tokens[:, :30])
  second = apply(config, params, tokens[:, 30:], first.state)
  both = jnp.concatenate([first.logits, second.logits], axis=1)
  np.testing.assert_allclose(both, whole.logits, atol=2e-5)
  helpers.assert_trees_close(second.state, whole.state)

  @jax.jit
  def one_by_one(state, tokens):
    def step(state, token):
      out = tvq.make_transformer(config).apply(params, None, token[:, None], state)
      return out.state, out.logits[:, 0]

    return jax.lax.scan(step, state, tokens.T)

  end, logits = one_by_one(first.state, tokens[:, 30:])
  np.testing.assert_allclose(logits.swapaxes(0, 1), whole.logits[:, 30:], atol=2e-5)
  helpers.assert_trees_close(end, whole.state)
  _, logits = one_by_one(tvq.initial_state(config, 2), tokens[:, :23])
  np.testing.assert_allclose(logits.swapaxes(0, 1), whole.logits[:, :23], atol=2e-5)


@pytest.mark.parametrize(
  "name", ["absolute", "no cache", "single tokens", "scan", "assoc_scan", "mha", "mqa", "full"]
)
def test_causality_jacobian_is_lower_triangular(name):
  config, length = tiny(**VARIANTS[name]), 12
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 1, length)

  def summaries(vectors):
    def swap(call, args, kwargs, context):
      if isinstance(context.module, layers.TokenEmbedding) and context.method_name == "__call__":
        return vectors[None]
      return call(*args, **kwargs)

    def forward():
      with hk.intercept_methods(swap):
        return tvq.Transformer(config)(tokens, tvq.initial_state(config, 1)).logits

    return hk.transform(forward).apply(params, None)[0] @ jnp.cos(jnp.arange(config.n_vocab))

  vectors = params["transformer/embedding"]["embeddings"][tokens[0]]
  influence = jnp.abs(jax.jit(jax.jacrev(summaries))(vectors)).sum(-1)
  assert float(jnp.triu(influence, 1).max()) == 0.0
  assert float(influence[jnp.tril_indices(length)].min()) > 0.0


def test_codebook_gradient_is_the_step_of_the_moving_average():
  config = tiny(n_layer=1, c_gamma=0.9)
  params = helpers.random_params(config)
  tokens = jnp.asarray(helpers.random_tokens(config, 2, 24))
  batch = dict(inputs=tokens, targets=tokens, loss_mask=jnp.ones((2, 24)).at[1, 20:].set(0.0))
  loss = lambda p: tvq.training_loss(config, p, None, batch, tvq.initial_state(config, 2))[0]
  (name,) = [m for m in params if m.endswith("attention_1/quantizer")]
  old, gradient = params[name], jax.jit(jax.grad(loss))(params)[name]
  new = {key: old[key] - gradient[key] for key in old}
  np.testing.assert_allclose(new["c_count"].sum(), 0.9 * old["c_count"].sum() + 0.1 * 44, rtol=1e-5)
  assert float(jnp.abs(gradient["c_sum"]).max()) > 0.0
  bound = 0.9 * jnp.abs(old["c_sum"]).sum(-1) + 0.1 * 44 * config.d_k
  assert (jnp.abs(new["c_sum"]).sum(-1) <= bound).all()


def test_every_parameter_gets_a_gradient_and_state_changes_the_output():
  for name in ("plain", "absolute", "grouped", "full mha"):
    config = tiny(**VARIANTS[name])
    params = helpers.random_params(config)
    tokens = jnp.asarray(helpers.random_tokens(config, 2, 40))
    batch = dict(inputs=tokens, targets=jnp.roll(tokens, 1, axis=1))
    loss = lambda p, s: tvq.training_loss(config, p, None, batch, s)[0]
    gradients = jax.jit(jax.grad(loss))(params, tvq.initial_state(config, 2))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
      unused = "output_bias" in str(path) and not config.e_tie
      assert (float(jnp.abs(leaf).max()) > 0.0) != unused, path
    warm = apply(config, params, tokens).state
    assert float(loss(params, warm)) != float(loss(params, tvq.initial_state(config, 2)))


def test_dropout_is_reproducible_and_windows_share_their_sequence_masks():
  config = tiny(n_layer=2, p_droplyr=0.5, p_dropsin=0.3)
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 4, 40)
  model = tvq.make_transformer(config)
  run = jax.jit(
    lambda rng, sequence_rng, tokens, state: model.apply(
      params, rng, tokens, state, is_training=True, sequence_rng=sequence_rng
    )
  )
  keys = jax.random.split(jax.random.key(0), 3)
  cold = tvq.initial_state(config, 4)
  whole = run(keys[0], keys[1], tokens, cold)
  first = run(keys[0], keys[1], tokens[:, :24], cold)
  second = run(keys[2], keys[1], tokens[:, 24:], first.state)
  both = jnp.concatenate([first.logits, second.logits], axis=1)
  np.testing.assert_allclose(both, whole.logits, atol=2e-5)
  other = run(keys[0], keys[2], tokens, cold)
  assert float(jnp.abs(other.logits - whole.logits).max()) > 1e-3


@pytest.mark.parametrize("rate", ["p_dropemb", "p_dropsin", "p_dropres", "p_droplyr"])
def test_each_dropout_acts_in_training_only(rate):
  config = tiny(**{rate: 0.5})
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 2, 16)
  model = tvq.make_transformer(config)
  run = jax.jit(
    lambda rng, training: (
      model.apply(params, rng, tokens, tvq.initial_state(config, 2), is_training=training).logits
    ),
    static_argnums=1,
  )
  first, second = (run(jax.random.key(i), True) for i in range(2))
  np.testing.assert_array_equal(first, run(jax.random.key(0), True))
  assert float(jnp.abs(first - second).max()) > 1e-3
  np.testing.assert_array_equal(run(jax.random.key(0), False), run(jax.random.key(1), False))


def test_dropped_layers_drop_rows_and_keep_the_mean():
  x = jnp.ones((4000, 3, 2))
  dropped = layers.dropout(jax.random.key(0), 0.25, x, per_example=True)
  rows = dropped.reshape(4000, -1)
  assert ((rows == 0).all(1) | jnp.isclose(rows, 1 / 0.75).all(1)).all()
  assert abs(float(dropped.mean()) - 1.0) < 0.05


def test_bfloat16_gradients_finite_and_dtypes_kept():
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
  out = apply(config, state.params, tokens)
  assert out.logits.dtype == jnp.float32
  assert out.state.attention_1.memory_values.dtype == jnp.bfloat16
  full = apply(config.replace(precision="float32"), state.params, tokens)
  assert 1e-6 < float(jnp.abs(out.logits - full.logits).max()) < 0.2


def test_bfloat16_counts_stay_exact_past_256():
  config = tiny(precision="bfloat16", n_layer=1)
  params = helpers.random_params(config)
  state = apply(config, params, np.full((1, 700), 3, np.int32)).state
  for tokens in (np.full((1, 1), 3, np.int32),) * 3:
    state = apply(config, params, tokens, state).state
  assert float(state.attention_1.cache_counts.max()) == 703 - config.mem_len


def test_encoder_sees_both_sides_and_keeps_no_state():
  config, length = tiny(causal=False, mem_len=3, block_len=4, pe_abs=True), 21
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 2, length)
  state = tvq.initial_state(config, 2)
  out = apply(config, params, tokens)
  jax.tree.map(np.testing.assert_array_equal, out.state, state)
  for place in (0, length - 1):
    changed = tokens.copy()
    changed[0, place] = (tokens[0, place] + 1) % config.n_vocab
    moved = np.abs(apply(config, params, changed).logits - out.logits).max(-1) > 0
    assert moved[0].all() and not moved[1].any()
  # Padding and packing, as in a causal model.
  doc_ids = np.repeat([0, 1, -1], [9, 10, 2])[None].astype(np.int32)
  packed = apply(config, params, tokens[:1], doc_ids=doc_ids)
  for document in (0, 1):
    own = doc_ids[0] == document
    alone = apply(config, params, tokens[:1, own])
    np.testing.assert_allclose(packed.logits[0, own], alone.logits[0], atol=2e-5)


def test_residual_estimate_and_automatic_remat():
  config = tvq.TransformerConfig(n_vocab=259)
  assert remat_lib.resolve_remat(config, 2048) == "none"
  assert remat_lib.resolve_remat(config, 10**9) == "layer"
  assert remat_lib.resolve_remat(config.replace(remat="dots"), 10**9) == "dots"
  for variant in VARIANTS.values():
    assert remat_lib.activation_bytes(tiny(**variant), 2048) > 0


def test_one_layer_in_the_program_whatever_the_depth():
  def equations(n_layer):
    config = tiny(n_layer=n_layer)
    params = tvq.params_shapes(config)
    state = jax.eval_shape(lambda: tvq.initial_state(config, 1))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    apply = lambda p, t, s: tvq.make_transformer(config).apply(p, None, t, s).logits
    return str(jax.make_jaxpr(apply)(params, tokens, state)).count(" = ")

  assert equations(2) == equations(24)


@pytest.mark.parametrize(
  "preset, total", [("enwik8", 187_679_750), ("imagenet64", 1_249_622_276), ("pg19", 1_314_659_584)]
)
def test_parameter_totals_of_the_paper(preset, total):
  config = getattr(tvq.TransformerConfig, preset)()
  shapes = tvq.params_shapes(config)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total


def test_parameter_names_and_shapes():
  """A contract: checkpoints and interop depend on it. If it must change, write the file anew:

  python -c "import sys; sys.path.insert(0, 'tests'); import test_transformer as t; t.write_names()"
  """
  assert parameter_names() == json.loads(NAMES.read_text())


NAMES = helpers.GOLDEN / "parameters.json"


def parameter_names():
  configs = {
    "untied": tiny(n_layer=2),
    "tied": tiny(n_layer=2, **VARIANTS["absolute"]),
    "mqa": tiny(n_layer=2, **VARIANTS["mqa"]),
    "full": tiny(n_layer=2, **VARIANTS["full"]),
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


def test_initial_values():
  config = tvq.TransformerConfig(
    n_vocab=400, d_model=64, d_k=32, d_v=96, n_code=64, pe_abs=True, e_preln=True
  )
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = jax.jit(tvq.make_transformer(config).init)(
    jax.random.key(0), tokens, tvq.initial_state(config, 1)
  )
  for module, leaves in params.items():
    part = module.split("/")[-1]
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
        assert part in ("embedding", "quantizer")


def test_use_inside_a_transform_of_ones_own():
  config = tiny()

  def classify(tokens):
    out = tvq.Transformer(config)(tokens, tvq.initial_state(config, tokens.shape[0]))
    return hk.Linear(2)(out.logits[:, -1])

  model = hk.transform(classify)
  tokens = jnp.asarray(helpers.random_tokens(config, 3, 10))
  params = model.init(jax.random.key(0), tokens)
  assert model.apply(params, None, tokens).shape == (3, 2)


def test_remat_changes_nothing():
  tokens = jnp.asarray(helpers.random_tokens(tiny(), 2, 24))
  batch = dict(inputs=tokens, targets=tokens)
  gradients = []
  for remat in ("none", "block", "dots", "layer"):
    config = tiny(remat=remat)
    params = helpers.random_params(config)
    loss = lambda p, c=config: tvq.training_loss(c, p, None, batch, tvq.initial_state(c, 2))[0]
    gradients.append(jax.jit(jax.grad(loss))(params))
  for other in gradients[1:]:
    helpers.assert_trees_close(gradients[0], other)


def test_check_params_names_the_parameter_and_both_shapes():
  config = tiny()
  shapes = tvq.params_shapes(config)
  transformer.check_params(shapes, config)
  transformer.check_params(helpers.random_params(config), config)
  name = "transformer/unembedding"
  for params, message in (
    (
      {**shapes, name: {**shapes[name], "bias": np.zeros(3)}},
      r"has shape \(3,\), expected \(11,\)",
    ),
    ({**shapes, name: {"kernel": shapes[name]["kernel"]}}, r"is missing, expected shape \(11,\)"),
  ):
    with pytest.raises(ValueError, match=f"params do not fit this config: {name}/bias {message}"):
      transformer.check_params(params, config)
  with pytest.raises(ValueError, match=r"other/bias has shape \(3,\), but this config has no such"):
    transformer.check_params({**shapes, "other": {"bias": np.zeros(3)}}, config)
