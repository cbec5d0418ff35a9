"""Comparison with the paper's code: outputs, losses, metrics, states, gradients, training runs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.training import losses

import helpers

pytestmark = pytest.mark.slow

WINDOWS = ["enwik8_like", "imagenet_like", "heads_long_memory", "no_cache", "stop_grad_cache"]
RUNS = ["train_adamw", "train_adafactor"]


@functools.cache
def computed(name):
  """Computes the results of this library for both windows of a golden file.

  Returns:
    The configuration, the parameters, and for each window a tuple: golden arrays, evaluation
    output, training output, loss, auxiliary outputs, gradients.
  """
  arrays, config = helpers.golden(name)
  params = tvq.interop.params_from_official(helpers.subtree(arrays, "params"), config)
  model = tvq.make_transformer(config)

  @jax.jit
  def both(params, batch, state):
    loss = lambda p: tvq.training_loss(p, config, None, batch, state, with_metrics=True)
    evaluated = model.apply(params, None, batch["inputs"], state, batch["doc_ids"])
    trained = model.apply(
      params, None, batch["inputs"], state, batch["doc_ids"], batch["loss_mask"], is_training=True
    )
    return evaluated, trained, jax.value_and_grad(loss, has_aux=True)(params)

  state, windows = tvq.initial_state(config, arrays["window0/inputs"].shape[0]), []
  for i in range(2):
    window = helpers.subtree(arrays, f"window{i}")
    batch = {key: jnp.asarray(window[key]) for key in ("inputs", "targets", "doc_ids", "loss_mask")}
    evaluated, trained, ((loss, aux), gradients) = both(params, batch, state)
    state = aux.state
    windows.append((window, evaluated, trained, loss, aux, gradients))
  return config, params, windows


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("i", [0, 1])
class TestWindow:
  def test_log_probabilities(self, name, i):
    window, evaluated, trained, *_ = computed(name)[2][i]
    for out, key in ((evaluated, "eval_logprobs"), (trained, "logprobs")):
      np.testing.assert_allclose(jax.nn.log_softmax(out.logits), window[key], atol=2e-5)

  def test_losses(self, name, i):
    window, _, _, loss, aux, _ = computed(name)[2][i]
    np.testing.assert_allclose(loss, window["loss"], atol=2e-5)
    np.testing.assert_allclose(aux.loss_commit, window["l_commit"], atol=2e-5)
    scored = window["metrics/loss_lm_per_token_unscaled"] / window["metrics/loss_mask_per_token"]
    np.testing.assert_allclose(aux.loss_lm, scored, atol=2e-5)

  def test_metrics(self, name, i):
    window, *_, aux, _ = computed(name)[2][i]
    theirs = {
      key: value
      for key, value in helpers.subtree(window, "metrics").items()
      if not key.startswith("loss_")
    }
    assert theirs.keys() == aux.metrics.keys()
    for key, value in theirs.items():
      np.testing.assert_allclose(aux.metrics[key], value, atol=2e-5, err_msg=key)

  def test_state(self, name, i):
    window, *_, aux, _ = computed(name)[2][i]
    for layer in range(computed(name)[0].n_layer):
      for j, ours in enumerate((aux.state.attention_1, aux.state.attention_2)):
        theirs = helpers.subtree(window, f"state/{layer}/{j}")
        for key, value in {
          "pos_offset": ours.position,
          "xlcache/z": ours.memory_codes,
          "xlcache/k_hat": ours.memory_keys,
          "xlcache/v": ours.memory_values,
          "xlcache/doc_ids": ours.memory_docs,
          "aggcache/lower": ours.cache_counts,
          "aggcache/upper_div_lower": ours.cache_means,
          "aggcache/latest_doc_id": ours.cache_doc,
        }.items():
          want = np.broadcast_to(theirs[key], value[layer].shape)
          np.testing.assert_allclose(value[layer], want, atol=2e-5, err_msg=key)

  def test_gradients(self, name, i):
    config, _, windows = computed(name)
    window, *_, gradients = windows[i]
    ours = tvq.interop.params_to_official(gradients, config)
    theirs = helpers.subtree(window, "grads")
    assert ours.keys() == theirs.keys()
    for key, want in theirs.items():
      np.testing.assert_allclose(
        ours[key], want, atol=1e-4 * np.abs(want).max(), rtol=0, err_msg=key
      )


@pytest.mark.parametrize("name", WINDOWS)
def test_one_token_at_a_time(name):
  arrays, config = helpers.golden(name)
  _, params, windows = computed(name)
  model = tvq.make_transformer(config)
  tokens = jnp.concatenate([window["inputs"] for window, *_ in windows], axis=1)

  @jax.jit
  def read(tokens):
    def step(state, token):
      out = model.apply(params, None, token[:, None], state)
      return out.state, out.logits[:, 0]

    return jax.lax.scan(step, tvq.initial_state(config, tokens.shape[0]), tokens.T)[1]

  logprobs = jax.nn.log_softmax(read(tokens).swapaxes(0, 1))
  np.testing.assert_allclose(logprobs, arrays["stepwise/logprobs"], atol=2e-5)


@pytest.mark.parametrize("name", RUNS)
def test_training_run(name):
  arrays, config = helpers.golden(name)
  settings = json.loads(bytes(arrays["train"]))
  settings.pop("steps")
  train_cfg = tvq.TrainConfig(global_batch_size=arrays["tokens"].shape[1], **settings)
  params = tvq.interop.params_from_official(helpers.subtree(arrays, "params"), config)
  state = tvq.init_train_state(config, train_cfg, jax.random.key(0), params)
  step = tvq.make_train_step(config, train_cfg)
  losses, commits = [], []
  for tokens in arrays["tokens"]:
    batch = {
      "inputs": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "doc_ids": np.zeros_like(tokens[:, 1:]),
      "loss_mask": np.ones_like(tokens[:, 1:]),
    }
    state, metrics = step(state, batch, jax.random.key(1))
    losses.extend(metrics["loss_lm"])
    commits.extend(metrics["loss_commit"])
  np.testing.assert_allclose(losses, arrays["losses"], atol=1e-4)
  np.testing.assert_allclose(commits, arrays["commits"], atol=1e-4)
  assert int(state.step) == arrays["losses"].size
  final = helpers.subtree(arrays, "final_params")
  ours = tvq.interop.params_to_official(state.params, config)
  assert ours.keys() == final.keys()
  for key, want in final.items():
    np.testing.assert_allclose(ours[key], want, atol=2e-4, rtol=0, err_msg=key)


@pytest.mark.parametrize(
  "name, reduction",
  [  # reduction None: the one that the paper's code used
    ("fast_shga", None),
    ("fast_shga", "scan"),
    ("fast_mha", None),
    ("fast_mqa", None),
    ("full_mha", None),
    ("full_shga", None),
  ],
)
def test_optimized_branch(name, reduction):
  with np.load(helpers.GOLDEN / f"{name}.npz") as arrays:
    arrays = dict(arrays)
  settings = json.loads(bytes(arrays["config"]))
  length = settings.pop("sequence_len")
  their_reduction = settings.pop("reduction_type")
  if settings["head_type"] == "shga":
    settings |= dict(d_v=2 * settings["d_model"])
  else:
    settings |= dict(n_head=settings["d_model"] // settings["d_k"], d_v=settings["d_k"])
  full = settings["attn_type"] == "full"
  config = tvq.TransformerConfig(
    reduction=reduction or their_reduction,
    mem_len=length if full else settings["block_len"],
    **settings,
  )
  params = tvq.interop.params_from_official(helpers.subtree(arrays, "params"), config)
  tokens, mask = arrays["tokens"], arrays["loss_mask"].astype(np.float32)
  state = tvq.initial_state(config, tokens.shape[0])

  @jax.jit
  def compute(params):
    # Their mask does not apply to the commitment loss, and their loss has no codebook term.
    def loss(params):
      out = tvq.make_transformer(config).apply(
        params, None, tokens[:, :-1], state, is_training=True
      )
      ce = losses.weighted_nll(out.logits, tokens[:, 1:], mask) / mask.size
      return ce + config.c_beta * out.commit_loss, (out, ce)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, (out, ce)), gradients = compute(params)
  np.testing.assert_allclose(out.logits, arrays["logits"], atol=1e-5)
  for got, key in ((loss, "loss"), (ce, "ce"), (out.commit_loss, "l_commit")):
    np.testing.assert_allclose(got, arrays[key], rtol=1e-5, atol=1e-6)
  ours = tvq.interop.params_to_official(gradients, config, layout="optimized")
  expected = helpers.subtree(arrays, "grads")
  assert ours.keys() == expected.keys()
  for key, want in expected.items():
    np.testing.assert_allclose(ours[key], want, atol=1e-4 * np.abs(want).max(), rtol=0, err_msg=key)
  back = tvq.interop.params_to_official(params, config, layout="optimized")
  for key, want in helpers.subtree(arrays, "params").items():
    np.testing.assert_array_equal(back[key], want, err_msg=key)
