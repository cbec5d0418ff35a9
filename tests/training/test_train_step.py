"""Training steps: updates, metrics, skipped updates, revived codes, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import quantizer
from tvq_haiku.training import losses
from tvq_haiku.training import train_step as train_step_lib

import helpers
from helpers import assert_same

pytestmark = pytest.mark.slow

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING
QUANTIZER = "transformer/layers/attention_1/quantizer"


def make_batch():
  return next(helpers.run_batches())


def initial_state(config=CONFIG, params=None, train_cfg=TRAIN):
  return tvq.init_train_state(config, train_cfg, jax.random.key(0), params)


def test_a_step_makes_one_update_per_window_and_reports_each():
  step = tvq.make_train_step(CONFIG, TRAIN, with_metrics=True)
  state, metrics = step(initial_state(), make_batch(), jax.random.key(1))
  assert int(state.step) == 2
  names = {"loss", "loss_lm", "loss_commit", "grad_norm", "learning_rate", "skipped"}
  assert names | {"code_perplexity", "code_use", "c_entropy"} <= metrics.keys()
  for name, value in metrics.items():
    assert value.shape == (2,) and value.dtype == jnp.float32 and np.isfinite(value).all(), name
  np.testing.assert_allclose(metrics["learning_rate"], [0.0, 0.5e-2], rtol=1e-6)
  assert metrics["skipped"].tolist() == [0.0, 0.0]


def test_a_step_equals_its_updates_one_by_one():
  """Each update continues from the parameters and from the model's state of the one before."""
  batch, rng = make_batch(), jax.random.key(1)
  want = initial_state()
  got, metrics = tvq.make_train_step(CONFIG, TRAIN)(initial_state(), batch, rng)
  model_state = tvq.initial_state(CONFIG, 2)
  rng, sequence_rng = jax.random.split(jax.random.fold_in(rng, 0))
  optimizer = train_step_lib.optimizers.make_optimizer(TRAIN)
  for i in range(2):
    window = {key: value[:, 16 * i : 16 * (i + 1)] for key, value in batch.items()}
    loss, aux, gradients = jax.jit(
      train_step_lib.gradients_lib.loss_gradients, static_argnames="config"
    )(
      want.params,
      CONFIG,
      jax.random.fold_in(rng, i),
      window,
      model_state,
      sequence_rng=sequence_rng,
    )
    np.testing.assert_allclose(metrics["loss"][i], loss, rtol=1e-5)
    updates, opt_state = optimizer.update(gradients, want.opt_state, want.params)
    params = jax.tree.map(jnp.add, want.params, updates)
    want, model_state = train_step_lib.TrainState(params, opt_state, want.step + 1), aux.state
  helpers.assert_trees_close(got.params, want.params, atol=1e-5)
  helpers.assert_trees_close(got.opt_state, want.opt_state, atol=1e-5)


def test_the_index_of_the_update_is_folded_into_the_key():
  config = CONFIG.replace(p_dropres=0.5)
  step = tvq.make_train_step(config, TRAIN.replace(lr_max=0.0))
  values = []
  for start in (0, 0, 2):
    state = initial_state(config)._replace(step=jnp.int32(start))
    _, metrics = step(state, make_batch(), jax.random.key(1))
    values.append(float(metrics["loss_lm"][0]))
  assert values[0] == values[1] != values[2]


def test_training_memorizes_a_batch():
  config = CONFIG.replace(p_dropres=0.0, p_droplyr=0.0)
  train_cfg = TRAIN.replace(n_max_step=200)
  state, step = initial_state(config, train_cfg=train_cfg), tvq.make_train_step(config, train_cfg)
  values = []
  for _ in range(60):
    state, metrics = step(state, make_batch(), jax.random.key(0))
    values.append(float(metrics["loss_lm"].mean()))
  assert values[-1] < 0.5 * values[0]
  assert step.n_compiled() == 1


def test_the_number_of_compilations_is_counted():
  step = tvq.make_train_step(CONFIG, TRAIN)
  assert step.n_compiled() == 0
  state = initial_state()
  step(state, make_batch(), jax.random.key(1))
  batch = make_batch()
  del batch["loss_mask"]  # another structure needs another program
  step(initial_state(), batch, jax.random.key(1))
  assert step.n_compiled() == 2


def test_a_step_is_lowered_for_shapes():
  batch = make_batch()
  lowered = tvq.make_train_step(CONFIG, TRAIN).lower(
    train_step_lib.train_state_shapes(CONFIG, TRAIN), batch, jax.random.key(0)
  )
  state, metrics = lowered.out_info
  assert metrics["loss"].shape == (2,)
  assert state.params["transformer/embedding"]["embeddings"].shape == (259, 16)


def test_given_parameters_are_copied_not_donated():
  params = initial_state().params
  before = jax.device_get(params)
  state = initial_state(params=params)
  for given, copied in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
    assert given.unsafe_buffer_pointer() != copied.unsafe_buffer_pointer()
  state, _ = tvq.make_train_step(CONFIG, TRAIN)(state, make_batch(), jax.random.key(0))
  assert_same(params, before)
  name = "transformer/unembedding"
  assert not np.array_equal(state.params[name]["kernel"], before[name]["kernel"])


@pytest.mark.parametrize(
  "key, change, message",
  [
    ("inputs", lambda x: x[:, 1:], r"batch\['inputs'\] must have shape \(2, 32\).*got \(2, 31\)"),
    ("targets", lambda x: x + 256, r"batch\['targets'\]: tokens must lie in \[0, 259\)"),
    ("inputs", lambda x: x * 1.0, r"batch\['inputs'\]: tokens must be integers, got float64"),
    ("targets", None, "batch lacks 'targets'"),
    ("weights", lambda x: np.ones((2, 32)), r"unknown keys \['weights'\]"),
  ],
)
def test_wrong_batches_are_rejected(key, change, message):
  batch = make_batch()
  if change is None:
    del batch[key]
  else:
    batch[key] = change(batch.get(key))
  with pytest.raises((TypeError, ValueError), match=message):
    tvq.make_train_step(CONFIG, TRAIN)(initial_state(), batch, jax.random.key(0))


@pytest.mark.parametrize("rng", [0, None, np.zeros(2)])
def test_anything_but_a_key_is_rejected(rng):
  with pytest.raises(TypeError, match=r"init_train_state: rng must be a random key, such as"):
    tvq.init_train_state(CONFIG, TRAIN, rng)
  step = tvq.make_train_step(CONFIG, TRAIN)
  with pytest.raises(TypeError, match=r"make_train_step: rng must be a random key, such as"):
    step(None, {}, rng)


def test_parameters_of_a_different_config_are_rejected():
  with pytest.raises(
    ValueError, match=r"quantizer/c_count has shape \(1, 1, 6\), expected \(1, 1, 7\)"
  ):
    initial_state(CONFIG.replace(n_code=7), helpers.random_params(CONFIG))


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_dtypes_stay_the_same_under_a_bfloat16_policy(optimizer):
  """Parameters, optimizer state and metrics are float32; only the momentum of Lion is bfloat16."""
  config = CONFIG.replace(precision="bfloat16")
  train_cfg = TRAIN.replace(optimizer=optimizer)
  step = tvq.make_train_step(config, train_cfg, with_metrics=True)
  before = initial_state(config, train_cfg=train_cfg)
  dtypes = jax.tree.map(lambda x: x.dtype, before)
  after, metrics = step(before, make_batch(), jax.random.key(1))
  assert jax.tree.map(lambda x: x.dtype, after) == dtypes
  assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
  assert {x.dtype for x in metrics.values()} == {jnp.dtype("float32")}
  floating = {
    x.dtype for x in jax.tree.leaves(after.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)
  }
  assert floating == {jnp.dtype("bfloat16" if optimizer == "lion" else "float32")}


class TestSkippedUpdates:
  """An update with a non-finite loss or gradient changes nothing but the count of updates."""

  def test_nothing_but_the_count_changes(self):
    state = initial_state(params=helpers.overflowing_params(CONFIG))
    before = jax.device_get(state)
    after, metrics = tvq.make_train_step(CONFIG, TRAIN)(state, make_batch(), jax.random.key(1))
    assert metrics["skipped"].tolist() == [1.0, 1.0] and int(after.step) == 2
    assert_same(after.params, before.params)
    assert_same(after.opt_state, before.opt_state)

  def test_the_next_window_starts_from_a_finite_state(self, monkeypatch):
    original = losses.training_loss

    def non_finite(params, config, rng, batch, state, **settings):
      loss, aux = original(params, config, rng, batch, state, **settings)
      factor = jnp.where(batch["inputs"][0, 0] == 7, jnp.nan, 1.0)  # only in the first window
      state = jax.tree.map(
        lambda x: x * factor if jnp.issubdtype(x.dtype, jnp.floating) else x, aux.state
      )
      return loss * factor, aux._replace(state=state, loss_lm=aux.loss_lm * factor)

    monkeypatch.setattr(losses, "training_loss", non_finite)
    batch = make_batch()
    batch["inputs"][0, 0], batch["inputs"][0, 16] = 7, 8
    state, metrics = tvq.make_train_step(CONFIG, TRAIN)(initial_state(), batch, jax.random.key(1))
    assert metrics["skipped"].tolist() == [1.0, 0.0]
    assert np.isnan(metrics["loss"][0]) and np.isfinite(metrics["loss"][1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))

  @pytest.mark.parametrize(
    "module, name", [("transformer/embedding", "embeddings"), (QUANTIZER, "c_sum")]
  )
  def test_a_non_finite_gradient_of_a_finite_loss_skips_the_update(self, monkeypatch, module, name):
    original = losses.training_loss

    def infinite_slope(params, config, *args, **settings):
      loss, aux = original(params, config, *args, **settings)
      p = params[module][name]
      return loss + jnp.sum(jnp.sqrt(p - jax.lax.stop_gradient(p))), aux  # adds 0

    monkeypatch.setattr(losses, "training_loss", infinite_slope)
    state = initial_state()
    before = jax.device_get(state.params)
    state, metrics = tvq.make_train_step(CONFIG, TRAIN)(state, make_batch(), jax.random.key(1))
    assert np.isfinite(metrics["loss"]).all() and metrics["skipped"].tolist() == [1.0, 1.0]
    assert_same(state.params, before)

  def test_a_replay_returns_the_inputs_of_the_first_skipped_update(self, monkeypatch):
    original = losses.training_loss

    def non_finite(params, config, rng, batch, state, **settings):
      loss, aux = original(params, config, rng, batch, state, **settings)
      return jnp.where(batch["inputs"][0, 0] == 8, jnp.nan, 1.0) * loss, aux

    monkeypatch.setattr(losses, "training_loss", non_finite)
    batch, rng = make_batch(), jax.random.key(1)
    batch["inputs"][0, 0] = 7
    assert train_step_lib.replay_to_skipped(CONFIG, TRAIN, initial_state(), batch, rng) is None
    batch["inputs"][0, 16] = 8
    inputs = train_step_lib.replay_to_skipped(CONFIG, TRAIN, initial_state(), batch, rng)
    assert_same(inputs["batch"], {key: value[:, 16:] for key, value in batch.items()})
    assert inputs["state"].position.tolist() == [16, 16]
    # The parameters are those after the first update; the step ends with them, too.
    state, _ = tvq.make_train_step(CONFIG, TRAIN)(initial_state(), batch, rng)
    helpers.assert_trees_close(inputs["params"], state.params, atol=1e-6)


class TestRevivedCodes:
  """With c_revive, codes that are hardly used are replaced by keys of the batch."""

  def params_after_a_step(self, params, config):
    step = tvq.make_train_step(config, TRAIN.replace(lr_max=0.0, n_warmup_step=0))
    state, _ = step(initial_state(config, params), make_batch(), jax.random.key(1))
    return state.params

  def test_only_unused_codes_are_revived(self):
    config = CONFIG.replace(p_dropres=0.0, p_droplyr=0.0, c_revive=0.2)
    params = dict(helpers.random_params(config))
    averages = params[QUANTIZER]
    params[QUANTIZER] = {
      "c_sum": averages["c_sum"].at[0, 0, 2].set(1e3),
      "c_count": averages["c_count"].at[0, 0, 2].set(0.1),
    }
    off = self.params_after_a_step(params, config.replace(c_revive=0.0))[QUANTIZER]
    on = self.params_after_a_step(params, config)[QUANTIZER]
    used = np.array([0, 1, 3, 4, 5])
    np.testing.assert_allclose(
      on["c_sum"][0, 0, used], off["c_sum"][0, 0, used], rtol=0.2, atol=0.2
    )
    assert float(off["c_count"][0, 0, 2]) < 0.2 and np.linalg.norm(off["c_sum"][0, 0, 2]) > 1e3
    # The first update makes it a key, of norm 8^(1/4), with a count of 1; the second is ordinary.
    code = on["c_sum"][0, 0, 2] / on["c_count"][0, 0, 2]
    assert 0.9 < float(on["c_count"][0, 0, 2]) < 2.0 and np.linalg.norm(code) < 2.0

  def test_masked_tokens_do_not_replace_codes(self):
    k = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    mask = jnp.array([[1, 0, 0, 0], [0, 0, 0, 0]])
    keys, is_token = quantizer._random_keys(jax.random.key(1), k, mask, 50)
    assert 0 < int(is_token.sum()) < 150
    for g in range(3):
      assert_same(keys[g][is_token[g]], jnp.broadcast_to(k[0, 0, g], (int(is_token[g].sum()), 5)))
