"""Layers whose two attentions have different types: they equal their parts, and they train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import remat

import helpers
from helpers import apply, random_params, random_tokens, tiny

pytestmark = pytest.mark.slow

OUT = "transformer/layers/attention_{}/out"


def part(params, config, index):
  """Returns a model in which only attention `index` (1 or 2) of each layer has an effect."""
  config = config.replace(attn_type=config.attn_type[index - 1], no_emb=index == 2)
  other = OUT.format(3 - index)
  params = {name: params.get(name, leaves) for name, leaves in random_params(config).items()}
  return {**params, other: jax.tree.map(jnp.zeros_like, params[other])}, config


@pytest.mark.parametrize("pair", [("vq", "full"), ("full", "vq"), ("window", "vq")])
def test_a_hybrid_layer_applies_one_part_after_the_other(pair):
  config = tiny(attn_type=pair, full_len=20, mem_len=6)
  params, tokens = random_params(config), random_tokens(config, 2, 45)
  first = apply(*part(params, config, 1), tokens)
  second = apply(*part(params, config, 2), first.hidden)
  hybrid = apply(params, config, tokens)
  np.testing.assert_allclose(hybrid.hidden, second.hidden, atol=2e-5)
  helpers.assert_trees_close(hybrid.state.attention_1, first.state.attention_1)
  helpers.assert_trees_close(hybrid.state.attention_2, second.state.attention_2)


def test_the_context_of_full_attention_is_full_len_and_that_of_a_window_is_mem_len():
  tokens = random_tokens(tiny(), 1, 40)
  changed = tokens.copy()
  changed[0, 3] = (tokens[0, 3] + 1) % 11
  for settings, n_affected in (
    (dict(attn_type="full", full_len=20, mem_len=5), 21),
    (dict(attn_type="full", mem_len=5), 6),
    (dict(attn_type="window", full_len=20, mem_len=5), 6),
  ):
    config = tiny(**settings, head_type="mha", d_v=8)
    params = random_params(config)
    before, after = (apply(params, config, x).logits[0] for x in (tokens, changed))
    affected = np.abs(before - after).max(-1) > 0
    np.testing.assert_array_equal(affected, (np.arange(40) >= 3) & (np.arange(40) < 3 + n_affected))


def test_only_quantized_attentions_have_codebooks_losses_and_metrics():
  tokens = random_tokens(tiny(), 2, 24)
  for pair, n_codebook in ((("vq", "full"), 1), (("full", "window"), 0)):
    config = tiny(attn_type=pair)
    params = random_params(config)
    assert sum("quantizer" in module for module in params) == n_codebook
    out = tvq.make_transformer(config).apply(
      params, None, tokens, is_training=True, with_metrics=True
    )
    assert (float(out.commit_loss) > 0.0) == ("c_entropy" in out.metrics) == (n_codebook > 0)
    assert all(np.isfinite(x) for x in out.metrics.values())


def test_a_hybrid_trains_with_remat_and_metrics_of_its_codebooks():
  config = tiny(attn_type=("vq", "full"), full_len=32, n_layer=2, remat="layer")
  train_cfg = tvq.TrainConfig(
    optimizer="adafactor",
    lr_max=1e-2,
    n_warmup_step=2,
    n_max_step=60,
    sequence_len=32,
    update_len=16,
    global_batch_size=2,
  )
  tokens = random_tokens(config, 2, 33)
  batch = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:])
  state = tvq.init_train_state(config, train_cfg, jax.random.key(0))
  step = tvq.make_train_step(config, train_cfg, with_metrics=True)
  losses = []
  for _ in range(20):
    state, metrics = step(state, batch, jax.random.key(1))
    losses += metrics["loss_lm"].tolist()
  assert all(np.isfinite(value).all() for value in metrics.values())
  assert {"code_use", "c_entropy"} <= metrics.keys()
  assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])


@pytest.mark.parametrize(
  "settings",
  [
    dict(attn_type=("vq", "full"), full_len=32, n_layer=2, remat="layer"),
    dict(head_type="mha", n_head=2, d_v=8, reduction="scan", remat="dots"),
  ],
)
def test_forward_mode_of_the_training_loss_agrees_with_reverse_mode(settings):
  config = tiny(**settings)
  params, tokens = random_params(config), random_tokens(config, 2, 25)
  batch = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:])

  @jax.jit
  def both_modes(params, tangents):
    loss = lambda p: tvq.training_loss(p, config, None, batch, tvq.initial_state(config, 2))[0]
    products = jax.tree.map(lambda g, t: jnp.sum(g * t), jax.grad(loss)(params), tangents)
    return jax.jvp(loss, (params,), (tangents,))[1], jax.tree.reduce(jnp.add, products)

  np.testing.assert_allclose(*both_modes(params, random_params(config, seed=1)), rtol=1e-4)


def test_a_saved_hybrid_loads_and_samples(tmp_path):
  config = helpers.RUN.replace(
    head_type="shga", n_head=1, d_v=16, attn_type=("vq", "full"), full_len=32
  )
  params = random_params(config)
  tvq.export_params(params, config, tmp_path / "params.safetensors")
  loaded, loaded_config = tvq.import_params(tmp_path / "params.safetensors")
  assert loaded_config == config and loaded_config.attn_type == ("vq", "full")
  helpers.assert_same(loaded, params)
  settings = dict(max_new_tokens=20, rng=jax.random.key(0), temperature=0.0)
  prompts = random_tokens(config, 2, 30)
  out = tvq.generate(loaded, config, prompts, **settings)
  text = np.concatenate([prompts, out.tokens], axis=1)
  logits = apply(params, config, text).logits
  np.testing.assert_array_equal(out.tokens, jnp.argmax(logits[:, 29:-1], axis=-1))


def test_the_activation_estimate_of_a_hybrid_is_the_mean_of_its_parts():
  hybrid = tvq.TransformerConfig(n_vocab=259, attn_type=("vq", "full"))
  parts = [hybrid.replace(attn_type=name) for name in hybrid.attn_type]
  total = sum(remat.activation_bytes(config, 2048) for config in parts)
  assert 2 * remat.activation_bytes(hybrid, 2048) == total
