"""A model that reads features (`no_emb`) equals the token model that embeds them; bad inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import parameters

import helpers
from helpers import VARIANTS, apply, random_features, random_params, random_tokens, tiny

pytestmark = pytest.mark.slow

EMBEDDING = "transformer/embedding"
CONFIG = tiny(no_emb=True)


def pair_of_models(name):
  """Returns a token model and its parameters, and the same model of features."""
  config = tiny(**VARIANTS[name])
  params = random_params(config)
  of_features = {
    module: leaves
    for module, leaves in params.items()
    if module != EMBEDDING or config.e_tie  # a tied output projection needs the embeddings
  }
  return config, params, config.replace(no_emb=True), of_features


def test_the_only_embeddings_are_those_of_a_tied_output():
  for name in ("plain", "mha", "absolute"):
    config, _, feature_config, of_features = pair_of_models(name)
    parameters.check_params(of_features, feature_config)
    assert (EMBEDDING in of_features) == config.e_tie
  initial = tvq.make_transformer(CONFIG).init(jax.random.key(0), random_features(CONFIG, 1, 3))
  parameters.check_params(initial, CONFIG)


@pytest.mark.parametrize("name", ["plain", "absolute", "mqa", "hybrid"])
def test_features_that_are_embeddings_give_the_output_of_the_token_model(name):
  """Includes packed documents, padding anywhere (which may be NaN), and a warm state."""
  config, params, feature_config, of_features = pair_of_models(name)
  tokens = random_tokens(config, 2, 40)
  embedded = np.asarray(params[EMBEDDING]["embeddings"])[tokens]
  docs = np.repeat([[0, 1, 1], [0, 0, 2]], [9, 9, 22], axis=1).astype(np.int32)
  docs[0, 25:29] = docs[1, 30:] = -1
  embedded[docs < 0] = np.nan
  state = want_state = None
  for window in (slice(0, 21), slice(21, 40)):
    want = apply(params, config, tokens[:, window], want_state, doc_ids=docs[:, window])
    got = apply(of_features, feature_config, embedded[:, window], state, doc_ids=docs[:, window])
    is_token = docs[:, window] >= 0
    np.testing.assert_allclose(got.logits[is_token], want.logits[is_token], atol=1e-5)
    helpers.assert_trees_close(got.state, want.state)
    state, want_state = got.state, want.state


@pytest.mark.parametrize("name", ["absolute", "mha", "hybrid"])
def test_windows_and_single_steps_give_the_logits_and_state_of_one_call(name):
  config = tiny(**VARIANTS[name], no_emb=True)
  params, features = random_params(config), random_features(config, 2, 37)
  one_call = apply(params, config, features)
  first = apply(params, config, features[:, :20])
  second = apply(params, config, features[:, 20:], first.state)
  windows = jnp.concatenate([first.logits, second.logits], axis=1)
  np.testing.assert_allclose(windows, one_call.logits, atol=2e-5)
  helpers.assert_trees_close(second.state, one_call.state)
  weights = tvq.prepare_weights(params, config)

  @jax.jit
  def read_single_steps(features):
    def step(states, x):
      out = tvq.make_transformer(config).apply(params, None, x[:, None], states[0])
      logits, decoded = tvq.decode_step(weights, config, x, states[1])
      return (out.state, decoded), (out.logits[:, 0], logits)

    start = tvq.initial_state(config, 2)
    start = start, tvq.start_decoding(config, start)
    return jax.lax.scan(step, start, features.swapaxes(0, 1))

  (state, decoded), all_logits = read_single_steps(features)
  for logits in all_logits:
    np.testing.assert_allclose(logits.swapaxes(0, 1), one_call.logits, atol=2e-5)
  helpers.assert_trees_close(state, one_call.state)
  helpers.assert_trees_close(tvq.finish_decoding(decoded), one_call.state)


@pytest.mark.parametrize("name", ["absolute", "grouped", "mha", "hybrid"])
def test_causality_jacobian_in_the_features_is_lower_triangular(name):
  config, length = tiny(**VARIANTS[name], no_emb=True), 12
  params, features = random_params(config), random_features(config, 1, length)[0]

  def projected_logits(features):
    out = tvq.make_transformer(config).apply(params, None, features[None])
    return out.logits[0] @ jnp.cos(jnp.arange(config.n_vocab))

  influence = jnp.abs(jax.jit(jax.jacrev(projected_logits))(features)).sum(-1)
  assert float(jnp.triu(influence, 1).max()) == 0.0
  assert float(influence[jnp.tril_indices(length)].min()) > 0.0


def test_training_steps_decrease_the_loss():
  """The targets depend on the features, and memory of one token is needed for a low loss."""
  config = CONFIG.replace(n_vocab=4, remat="layer", precision="bfloat16", p_dropemb=0.01)
  train_cfg = tvq.TrainConfig(
    lr_max=1e-2,
    n_warmup_step=5,
    n_max_step=80,
    sequence_len=32,
    update_len=16,
    global_batch_size=4,
    n_accumulate=2,
  )
  features = random_features(config, 4, 32)
  signs = (features[..., 0] > 0).astype(np.int32)
  before = np.pad(signs[:, :-1], ((0, 0), (1, 0)))
  batch = dict(inputs=features, targets=2 * before + signs)
  state = tvq.init_train_state(config, train_cfg, jax.random.key(0))
  step = tvq.make_train_step(config, train_cfg)
  losses = []
  for _ in range(40):
    state, metrics = step(state, batch, jax.random.key(1))
    losses += metrics["loss_lm"].tolist()
  assert np.isfinite(losses).all() and losses[-1] < 0.5 * losses[0]
  sums, _ = tvq.make_eval_step(config)(state.params, batch, tvq.initial_state(config, 4))
  assert float(sums.tokens) == 128 and float(sums.nats / sums.tokens) < 0.5 * losses[0]


@pytest.mark.parametrize(
  "inputs, error, message",
  [
    (np.zeros((2, 5), np.int32), ValueError, r"features \[B, T, D=16\].*got shape \(2, 5\)"),
    (np.zeros((2, 5, 8)), ValueError, r"D=16\].*got shape \(2, 5, 8\)"),
    (np.zeros((2, 0, 16)), ValueError, r"with B, T >= 1.*got shape \(2, 0, 16\)"),
    (np.zeros((2, 5, 16), np.int32), TypeError, "must be floating, because no_emb=True; got int32"),
    ([[0.0]], TypeError, "inputs must be an array, got list"),
  ],
)
def test_wrong_features_are_named(inputs, error, message):
  with pytest.raises(error, match=message):
    tvq.make_transformer(CONFIG).apply(random_params(CONFIG), None, inputs)


def test_errors_of_a_batch_name_the_inputs():
  train_cfg = tvq.TrainConfig(sequence_len=8, update_len=8, global_batch_size=2)
  tokens = np.zeros((2, 8), np.int32)
  batch = dict(inputs=tokens, targets=tokens)
  with pytest.raises(ValueError, match=r"batch\['inputs'\] must be features \[B, T, D=16\]"):
    tvq.make_train_step(CONFIG, train_cfg)(None, batch, jax.random.key(0))
  with pytest.raises(ValueError, match=r"inputs must have shape \[B, T, D=16\], got \(2, 8\)"):
    tvq.training_loss({}, CONFIG, None, batch, None)
  with pytest.raises(ValueError, match=r"Features \[B, T, D\] need no_emb=True"):
    apply(random_params(tiny()), tiny(), np.zeros((2, 5, 16), np.float32))
