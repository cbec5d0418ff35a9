"""Learning rate schedules, the three optimizers, and the separate treatment of codebooks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tvq_haiku as tvq
from tvq_haiku.training import optimizers

QUANTIZER = "transformer/layers/attention_1/quantizer"


def make_params(n_layer=3):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  layer = "transformer/layers/attention_1"  # its parameters are stacked over the layers
  return {
    "transformer/unembedding": {"kernel": normal(130, 140), "bias": normal(140)},
    "transformer/position": {"scale": normal()},
    f"{layer}/q": {"kernel": normal(n_layer, 130, 140)},
    f"{layer}/norm": {"gain": normal(n_layer, 130)},
    QUANTIZER: {"c_sum": normal(n_layer, 1, 4, 8), "c_count": normal(n_layer, 1, 4)},
  }


def three_updates(train_cfg, params):
  """Returns the parameters after three updates with gradients that depend on the parameters."""
  optimizer = optimizers.make_optimizer(train_cfg)

  @jax.jit
  def run(params):
    state = optimizer.init(params)
    for i in range(3):
      gradients = jax.tree.map(lambda x: jnp.sin(7.0 * x + i), params)
      updates, state = optimizer.update(gradients, state, params)
      params = optax.apply_updates(params, updates)
    return params

  return run(params)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_stacked_layers_are_optimized_as_separate_parameters(optimizer):
  train_cfg = tvq.TrainConfig(optimizer=optimizer, grad_clip=None, wd_lam=0.01, n_warmup_step=0)
  params = make_params()
  stacked = three_updates(train_cfg, params)
  for i in range(3):
    single = {
      m: {n: x[i : i + 1] if "layers" in m else x for n, x in leaves.items()}
      for m, leaves in params.items()
    }
    for module, leaves in three_updates(train_cfg, single).items():
      for name, x in leaves.items():
        want = stacked[module][name]
        want = want[i : i + 1] if "layers" in module else want
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6, err_msg=f"{module} {name}")


def test_vectors_do_not_decay_and_decay_ignores_the_learning_rate():
  params = make_params()
  train_cfg = tvq.TrainConfig(lr_max=0.0, wd_lam=0.1, grad_clip=None, n_warmup_step=0)
  after = three_updates(train_cfg, params)
  for module, leaves in params.items():
    for name, before in leaves.items():
      if name in ("c_sum", "c_count"):
        continue
      kept = 1.0 if name in ("bias", "gain") else 0.9**3
      np.testing.assert_allclose(after[module][name], kept * before, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_codebooks_are_updated_by_sgd_with_every_optimizer(optimizer):
  """They are not clipped and do not decay, and their learning rate is 1."""
  params = make_params()
  train_cfg = tvq.TrainConfig(optimizer=optimizer, grad_clip=1e-9, wd_lam=0.5)
  after = three_updates(train_cfg, params)[QUANTIZER]
  for name, want in params[QUANTIZER].items():
    for i in range(3):
      want -= jnp.sin(7.0 * want + i)
    np.testing.assert_allclose(after[name], want, atol=1e-5, err_msg=name)


def test_the_clipped_norm_excludes_codebooks():
  gradients = make_params()
  large = jax.tree.map(lambda x: 1e6 * x, gradients[QUANTIZER])
  norm = optimizers.weight_gradient_norm(gradients)
  np.testing.assert_allclose(optimizers.weight_gradient_norm({**gradients, QUANTIZER: large}), norm)
  others = [x for m, leaves in gradients.items() if m != QUANTIZER for x in leaves.values()]
  np.testing.assert_allclose(norm, optax.tree.norm(others), rtol=1e-6)


def test_only_gradients_of_codebooks_are_mapped():
  params = make_params()
  gradients = jax.tree.map(jnp.ones_like, params)
  mapped = optimizers.map_codebook(lambda gradient, p: 2.0 * gradient + p, gradients, params)
  for module, leaves in gradients.items():
    for name, gradient in leaves.items():
      want = 2.0 + params[module][name] if module == QUANTIZER else gradient
      np.testing.assert_array_equal(mapped[module][name], want, err_msg=f"{module}/{name}")


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_non_finite_gradients_of_codebooks_are_found(value):
  gradients = make_params()
  assert optimizers.codebook_is_finite(gradients)
  kernel = {"kernel": gradients["transformer/unembedding"]["kernel"].at[0, 0].set(value)}
  assert optimizers.codebook_is_finite({**gradients, "transformer/unembedding": kernel})
  counts = gradients[QUANTIZER]["c_count"].at[1, 0, 2].set(value)
  spoiled = {**gradients[QUANTIZER], "c_count": counts}
  assert not optimizers.codebook_is_finite({**gradients, QUANTIZER: spoiled})
  del gradients[QUANTIZER]
  assert optimizers.codebook_is_finite(gradients)  # full attention has no codebook


def test_moment_dtypes():
  params = make_params()
  for optimizer, want in (("adamw", "float32"), ("lion", "bfloat16")):
    state = optimizers.make_optimizer(tvq.TrainConfig(optimizer=optimizer)).init(params)
    moments = {
      str(x.dtype)
      for path, x in jax.tree_util.tree_leaves_with_path(state)
      if ".mu" in jax.tree_util.keystr(path)
    }
    assert moments == {want}


@pytest.mark.parametrize(
  "name, middle, last",
  [
    ("cosine", 0.55, 0.1),
    ("linear", 0.55, 0.1),
    ("inv_sqrt", (10 / 55) ** 0.5, (10 / 100) ** 0.5),
  ],
)
def test_schedules_warm_up_from_zero_decay_and_end_at_n_max_step(name, middle, last):
  train_cfg = tvq.TrainConfig(
    lr_max=2.0, lr_schedule=name, n_warmup_step=10, n_max_step=100, n_extra_step=200
  )
  schedule = optimizers.learning_rate_schedule(train_cfg)
  rates = np.array([schedule(i) for i in range(300)])
  np.testing.assert_allclose(rates[:11], 2.0 * np.arange(11) / 10, rtol=1e-6)
  np.testing.assert_allclose(rates[55], 2.0 * middle, rtol=1e-5)
  np.testing.assert_allclose(rates[100:], 2.0 * last, rtol=1e-5)
  assert (np.diff(rates[10:101]) < 0).all()
  without = optimizers.learning_rate_schedule(train_cfg.replace(n_warmup_step=0))
  np.testing.assert_allclose(without(0), 2.0, rtol=1e-6)


def test_inverse_square_root_is_at_least_a_tenth():
  train_cfg = tvq.TrainConfig(lr_schedule="inv_sqrt", n_warmup_step=1, n_max_step=1000, lr_max=1.0)
  np.testing.assert_allclose(optimizers.learning_rate_schedule(train_cfg)(500), 0.1, rtol=1e-6)
