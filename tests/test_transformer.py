"""The whole model: invariants, names, sizes, bad input."""

import functools
import json

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import tvq_haiku as tvq
from tvq_haiku import layers

VARIANTS = {
    "plain": dict(),
    "heads": dict(n_head=2, d_v=32),
    "absolute": dict(pe_abs=True, e_tie=True, e_preln=True, e_scale=0.3),
    "long memory": dict(block_len=4, mem_len=24),
    "short memory": dict(block_len=16, mem_len=3),
    "single tokens": dict(block_len=1, mem_len=5),
    "no cache": dict(agg_cache=False),
    "crossing": dict(doc_mask=False),
}


def tiny(**changes):
  return tvq.TransformerConfig.tiny(**{
      **dict(n_vocab=11, d_model=16, d_k=8, d_v=16, n_code=6, block_len=8, mem_len=8), **changes})


def apply(config, params, tokens, state=None, **kwargs):
  state = tvq.initial_state(config, tokens.shape[0]) if state is None else state
  return jitted(config)(params, tokens, state, kwargs)


@functools.cache
def jitted(config):
  model = tvq.make_transformer(config)
  return jax.jit(lambda p, t, s, kwargs: model.apply(p, None, t, s, **kwargs))


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


@pytest.mark.parametrize("name", ["plain", "heads", "absolute", "no cache", "single tokens"])
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


@pytest.mark.parametrize("name", ["plain", "heads", "absolute", "long memory", "no cache"])
def test_packed_documents_equal_documents_alone(name):
  config = tiny(**VARIANTS[name])
  params = helpers.random_params(config)
  lengths = (13, 1, 30, 9)
  tokens = helpers.random_tokens(config, 1, sum(lengths))
  doc_ids = np.repeat([3, 4, 6, 7], lengths)[None].astype(np.int32)
  whole = apply(config, params, tokens, doc_ids=doc_ids)
  # Cut into windows that documents begin in, last over and end in.
  state, pieces = None, []
  for start, stop in ((0, 20), (20, 33), (33, 53)):
    out = apply(config, params, tokens[:, start:stop], state, doc_ids=doc_ids[:, start:stop])
    state, pieces = out.state, [*pieces, out.logits]
  np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole.logits, atol=2e-5)
  for document, length in zip((3, 4, 6, 7), lengths):
    own = doc_ids[0] == document
    # Cut off behind by padding, so that one program serves every length.
    row = np.zeros((1, 30), np.int32)
    row[0, :length] = tokens[0, own]
    ids = np.where(np.arange(30) < length, 0, -1)[None].astype(np.int32)
    alone = apply(config, params, row, doc_ids=ids).logits[0, :length]
    np.testing.assert_allclose(whole.logits[0, own], alone, atol=2e-5, err_msg=str(document))


def test_changing_one_document_never_moves_another():
  config = tiny()
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 1, 50)
  doc_ids = np.repeat([0, 1, 2], [14, 20, 16])[None].astype(np.int32)
  changed = tokens.copy()
  changed[0, 20] = (tokens[0, 20] + 1) % config.n_vocab
  for doc_mask in (True, False):
    model = config.replace(doc_mask=doc_mask)
    before, after = (apply(model, params, x, doc_ids=doc_ids).logits for x in (tokens, changed))
    moved = np.abs(before - after).max(-1)[0] > 0
    assert not moved[:20].any() and moved[20:34].all()
    assert moved[34:].any() != doc_mask

  def loss(doc, params):
    mask = (doc_ids == doc).astype(np.int32)
    batch = dict(inputs=jnp.asarray(tokens), targets=jnp.asarray(tokens), doc_ids=doc_ids,
                 loss_mask=mask)
    return tvq.training_loss(config, params, None, batch, tvq.initial_state(config, 1))[0]

  # Weights that only tokens of the first document use learn nothing from the third.
  only_first = sorted(set(tokens[0, :14]) - set(tokens[0, 34:]))
  gradient = jax.jit(jax.grad(loss, argnums=1))(2, params)["transformer/embedding"]["embeddings"]
  assert only_first and float(jnp.abs(gradient[np.array(only_first)]).max()) == 0.0


def test_padding_anywhere_changes_nothing():
  config = tiny(pe_abs=True)
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 3, 40)
  warm = apply(config, params, tokens[:, :9]).state
  tokens = tokens[:, 9:]
  real = np.ones((3, 31), bool)
  real[0, :7] = False  # in front
  real[1, 20:] = False  # behind
  real[2, ::3] = False  # between
  noise = np.where(real, tokens, (tokens + 5) % config.n_vocab)
  padded = apply(config, params, noise, warm, doc_ids=np.where(real, 0, -1).astype(np.int32))
  for row in range(3):
    one = lambda x, axis, r=row: jax.lax.slice_in_dim(x, r, r + 1, axis=axis)
    state = tvq.TransformerState(
        one(warm.document, 0), one(warm.position, 0),
        *(jax.tree.map(lambda x: one(x, 1), s) for s in (warm.attention_1, warm.attention_2)))
    alone = apply(config, params, tokens[row, real[row]][None], state)
    np.testing.assert_allclose(padded.logits[row, real[row]], alone.logits[0], atol=2e-5)
    got = tvq.TransformerState(
        one(padded.state.document, 0), one(padded.state.position, 0),
        *(jax.tree.map(lambda x: one(x, 1), s)
          for s in (padded.state.attention_1, padded.state.attention_2)))
    helpers.assert_trees_close(got, alone.state)


def test_padding_reaches_neither_losses_nor_codebook():
  config = tiny()
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 2, 24)
  doc_ids = np.zeros((2, 24), np.int32)
  doc_ids[1, 15:] = -1

  @jax.jit
  def gradients(tokens):
    batch = dict(inputs=tokens, targets=tokens, doc_ids=doc_ids, loss_mask=np.ones_like(doc_ids))
    return jax.value_and_grad(lambda p: tvq.training_loss(
        config, p, None, batch, tvq.initial_state(config, 2))[0])(params)

  other = np.where(doc_ids < 0, (tokens + 3) % config.n_vocab, tokens)
  jax.tree.map(np.testing.assert_array_equal, gradients(tokens), gradients(other))


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
  for name in ("plain", "absolute"):
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
  config = tiny(p_droplyr=0.5, p_dropsin=0.3)
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 4, 40)
  model = tvq.make_transformer(config)
  run = jax.jit(lambda rng, sequence_rng, tokens, state: model.apply(
      params, rng, tokens, state, is_training=True, sequence_rng=sequence_rng))
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
  run = jax.jit(lambda rng, training: model.apply(
      params, rng, tokens, tvq.initial_state(config, 2), is_training=training).logits,
                static_argnums=1)
  first, second = (run(jax.random.key(i), True) for i in range(2))
  np.testing.assert_array_equal(first, run(jax.random.key(0), True))
  assert float(jnp.abs(first - second).max()) > 1e-3
  np.testing.assert_array_equal(run(jax.random.key(0), False), run(jax.random.key(1), False))


def test_dropped_layers_drop_rows_and_keep_the_mean():
  x = jnp.ones((4000, 3, 2))
  dropped = layers.dropout(jax.random.key(0), 0.25, x, rows=True)
  rows = dropped.reshape(4000, -1)
  assert ((rows == 0).all(1) | jnp.isclose(rows, 1 / 0.75).all(1)).all()
  assert abs(float(dropped.mean()) - 1.0) < 0.05


def test_bfloat16_gradients_finite_and_dtypes_kept():
  config = tiny(precision="bfloat16")
  train_cfg = tvq.TrainConfig(n_warmup_step=0, n_max_step=10, sequence_len=32, update_len=16,
                              global_batch_size=2)
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


def test_one_layer_in_the_program_whatever_the_depth():
  def equations(n_layer):
    config = tiny(n_layer=n_layer)
    params = tvq.params_shapes(config)
    state = jax.eval_shape(lambda: tvq.initial_state(config, 1))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    apply = lambda p, t, s: tvq.make_transformer(config).apply(p, None, t, s).logits
    return len(str(jax.make_jaxpr(apply)(params, tokens, state)).splitlines())
  assert equations(2) == equations(24)


@pytest.mark.parametrize("preset, total", [
    ("enwik8", 187_679_750), ("imagenet64", 1_249_622_276), ("pg19", 1_314_659_584)])
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
  configs = {"untied": tiny(), "tied": tiny(**VARIANTS["absolute"])}
  return {key: {f"{module}:{name}": list(leaf.shape) for module, leaves in
                sorted(tvq.params_shapes(config).items()) for name, leaf in
                sorted(leaves.items())} for key, config in configs.items()}


def write_names():
  NAMES.write_text(json.dumps(parameter_names(), indent=1) + "\n")


def test_initial_values():
  config = tvq.TransformerConfig(n_vocab=400, d_model=64, d_k=32, d_v=96, n_code=64, pe_abs=True,
                                 e_preln=True)
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = jax.jit(tvq.make_transformer(config).init)(
      jax.random.key(0), tokens, tvq.initial_state(config, 1))
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
  for remat in ("none", "block", "layer"):
    config = tiny(remat=remat)
    params = helpers.random_params(config)
    loss = lambda p, c=config: tvq.training_loss(c, p, None, batch, tvq.initial_state(c, 2))[0]
    gradients.append(jax.jit(jax.grad(loss))(params))
  for other in gradients[1:]:
    helpers.assert_trees_close(gradients[0], other)


class TestBadInput:

  config = tiny()

  def call(self, tokens, state=None, **kwargs):
    state = tvq.initial_state(self.config, 2) if state is None else state
    apply = tvq.make_transformer(self.config).apply
    return jax.eval_shape(lambda params: apply(params, None, tokens, state, **kwargs),
                          tvq.params_shapes(self.config))

  @pytest.mark.parametrize("tokens, message", [
      (jnp.full((2, 5), 11), r"\[0, 11\), got 11...11"), (jnp.full((2, 5), -1), "got -1"),
      (jnp.zeros((2, 5)), "integers, got float32"), (jnp.zeros((5,), jnp.int32), r"shape \(5,\)"),
      (jnp.zeros((2, 0), jnp.int32), r"shape \(2, 0\)")])
  def test_tokens(self, tokens, message):
    with pytest.raises((TypeError, ValueError), match=message):
      self.call(tokens)

  def test_out_of_range_tokens_under_jit_become_nan(self):
    for token in (11, -1):
      tokens = jnp.full((1, 5), token)
      assert jnp.isnan(apply(self.config, helpers.random_params(self.config), tokens).logits).all()

  @pytest.mark.parametrize("other, batch, field", [
      (tiny(n_code=7), 2, "cache_counts"), (tiny(mem_len=4), 2, "memory_codes"),
      (tiny(n_layer=1), 2, "position"), (tiny(), 3, "document"),
      (tiny(precision="bfloat16"), 2, "memory_values")])
  def test_state_of_another_config_or_batch(self, other, batch, field):
    with pytest.raises(ValueError, match=field):
      self.call(jnp.zeros((2, 5), jnp.int32), tvq.initial_state(other, batch))

  def test_state_of_another_kind(self):
    with pytest.raises(ValueError, match="initial_state, got dict"):
      self.call(jnp.zeros((2, 5), jnp.int32), {"a": 1})

  @pytest.mark.parametrize("name", ["doc_ids", "loss_mask"])
  def test_masks_of_another_shape(self, name):
    with pytest.raises(ValueError, match=rf"{name} must have the shape of tokens, \(2, 5\)"):
      self.call(jnp.zeros((2, 5), jnp.int32), **{name: jnp.zeros((2, 4), jnp.int32)})

  def test_batch_size(self):
    with pytest.raises(ValueError, match="batch_size=0"):
      tvq.initial_state(self.config, 0)
