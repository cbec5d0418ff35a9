"""Training steps, and evaluation: every token counts once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq

import helpers

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING
make_batches = helpers.run_batches


def test_step_makes_one_update_per_window_and_reports_each():
  state = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0))
  step = tvq.make_train_step(CONFIG, TRAIN, with_metrics=True)
  state, metrics = step(state, next(make_batches()), jax.random.key(1))
  assert int(state.step) == 2
  assert {
    "loss",
    "loss_lm",
    "loss_commit",
    "grad_norm",
    "learning_rate",
    "c_entropy",
  } <= metrics.keys()
  for name, value in metrics.items():
    assert value.shape == (2,) and value.dtype == jnp.float32 and np.isfinite(value).all(), name
  np.testing.assert_allclose(metrics["learning_rate"], [0.0, 0.5e-2], rtol=1e-6)


def test_update_number_is_folded_into_the_key():
  config = CONFIG.replace(p_dropres=0.5)
  step = tvq.make_train_step(config, TRAIN.replace(lr_max=0.0))
  batch = next(make_batches())
  losses = []
  for start in (0, 0, 2):
    state = tvq.init_train_state(config, TRAIN, jax.random.key(0))
    _, metrics = step(state._replace(step=jnp.int32(start)), batch, jax.random.key(1))
    losses.append(float(metrics["loss_lm"][0]))
  assert losses[0] == losses[1] != losses[2]


def test_training_lowers_the_loss_of_a_text_learned_by_heart():
  config = CONFIG.replace(p_dropres=0.0, p_droplyr=0.0)
  train_cfg = TRAIN.replace(n_max_step=200)
  state = tvq.init_train_state(config, train_cfg, jax.random.key(0))
  step = tvq.make_train_step(config, train_cfg)
  batch = next(make_batches())
  losses = []
  for _ in range(60):
    state, metrics = step(state, batch, jax.random.key(0))
    losses.append(float(metrics["loss_lm"].mean()))
  assert losses[-1] < 0.5 * losses[0]


def test_given_parameters_are_copied_not_donated():
  params = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0)).params
  state = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0), params)
  tvq.make_train_step(CONFIG, TRAIN)(state, next(make_batches()), jax.random.key(0))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


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
def test_batches_that_do_not_fit(key, change, message):
  batch = next(make_batches())
  if change is None:
    del batch[key]
  else:
    batch[key] = change(batch.get(key))
  state = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0))
  with pytest.raises((TypeError, ValueError), match=message):
    tvq.make_train_step(CONFIG, TRAIN)(state, batch, jax.random.key(0))
  if key != "weights" and change is not None:
    with pytest.raises((TypeError, ValueError)):
      tvq.make_eval_step(CONFIG, TRAIN)(state.params, batch, tvq.initial_state(CONFIG, 2))


def test_parameters_of_another_config_are_named():
  with pytest.raises(
    ValueError, match=r"quantizer/c_count has shape \(1, 1, 6\), expected \(1, 1, 7\)"
  ):
    tvq.init_train_state(
      CONFIG.replace(n_code=7), TRAIN, jax.random.key(0), helpers.random_params(CONFIG)
    )


def test_weights_of_padding_and_fractions():
  params, state = helpers.random_params(CONFIG), tvq.initial_state(CONFIG, 2)
  plain = CONFIG.replace(p_dropres=0.0, p_droplyr=0.0)
  batch = {key: jnp.asarray(value) for key, value in next(make_batches()).items()}
  loss = jax.jit(lambda batch: tvq.training_loss(plain, params, None, batch, state))
  whole = loss(batch)[1].loss_lm
  faint = loss({**batch, "loss_mask": jnp.full((2, 32), 0.01)})[1].loss_lm
  np.testing.assert_allclose(faint, whole, rtol=1e-5)
  padded = {**batch, "doc_ids": batch["doc_ids"].at[:, 20:].set(-1)}
  value = loss(padded)[0]
  odd = {**padded, "targets": padded["targets"].at[:, 20:].set(-7)}
  assert np.isfinite(value) and loss(odd)[0] == value
  for wrong in (-1, 259):  # where it counts, a target out of range is not passed over in silence
    assert np.isnan(loss({**batch, "targets": batch["targets"].at[0, 0].set(wrong)})[0])
