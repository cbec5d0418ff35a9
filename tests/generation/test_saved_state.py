"""Tests of states in files: texts continue bit for bit, and damage is detected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.generation import saved_state

import helpers

CONFIG = helpers.tiny()
PARAMS = helpers.random_params(CONFIG)


def state_after(config, batch_size=2):
  params = helpers.random_params(config)
  return helpers.apply(params, config, helpers.random_tokens(config, batch_size, 21)).state


@pytest.mark.slow
def test_generation_continues_from_a_saved_state_bit_for_bit(tmp_path):
  def generate(prompts, n, **kwargs):
    rngs = jax.random.split(jax.random.key(3), 2)
    return tvq.generate(PARAMS, CONFIG, prompts, max_new_tokens=n, rng=rngs, **kwargs)

  first = generate(helpers.random_tokens(CONFIG, 2, 5), 8)
  tvq.save_state(first.state, CONFIG, tmp_path / "new" / "state", logits=first.logits)
  saved = tvq.load_state(CONFIG, tmp_path / "new" / "state")
  helpers.assert_same((saved.state, saved.logits), (first.state, first.logits))
  empty = np.zeros((2, 0), np.int32)
  expected = generate(empty, 8, state=first.state, logits=first.logits)
  helpers.assert_same(generate(empty, 8, state=saved.state, logits=saved.logits), expected)


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(precision="bfloat16"),
    dict(head_type="mha", n_head=2, d_v=8),
    dict(attn_type=("vq", "full")),
  ],
  ids=str,
)
def test_states_of_all_kinds_are_restored(tmp_path, changes):
  config = helpers.tiny(**changes)
  state = state_after(config)
  tvq.save_state(state, config, tmp_path / "state", pending=b"\xe6\x97")
  saved = tvq.load_state(config, tmp_path / "state")
  helpers.assert_same(saved.state, state)
  assert jax.tree.structure(saved.state) == jax.tree.structure(state)
  assert [x.dtype for x in jax.tree.leaves(saved.state)] == [
    x.dtype for x in jax.tree.leaves(state)
  ]
  assert saved.logits is None and saved.pending == b"\xe6\x97"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
  """The content of a file with a state."""
  file = tmp_path_factory.mktemp("state") / "state"
  tvq.save_state(state_after(CONFIG), CONFIG, file, logits=jnp.zeros((2, 11)))
  return file.read_bytes()


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda content: b"", "is not a state that save_state wrote"),
    (lambda content: b"a plain text that is longer than the header", "is not a state"),
    (lambda content: content[:4], "is damaged"),
    (lambda content: content[:7], "is damaged"),
    (lambda content: content[:11], "is damaged"),
    (lambda content: content[:-1], "is damaged"),
    (lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:], "is damaged"),
    (lambda content: content[:4] + b"\7" + content[5:], "has version 7, but only version 1"),
  ],
)
def test_damage_is_detected(tmp_path, content, damage, message):
  (tmp_path / "state").write_bytes(damage(content))
  with pytest.raises(ValueError, match=f"state {message}"):
    tvq.load_state(CONFIG, tmp_path / "state")


def test_a_state_of_another_model_is_refused(tmp_path, content):
  (tmp_path / "state").write_bytes(content)
  message = "state is the state of .*: n_code is 6 in the file, 7 here; n_layer is 1 in the file, 2"
  with pytest.raises(ValueError, match=message):
    tvq.load_state(CONFIG.replace(n_code=7, n_layer=2), tmp_path / "state")
  with pytest.raises(ValueError, match="doc_mask is True in the file, False here"):
    tvq.load_state(CONFIG.replace(doc_mask=False), tmp_path / "state")
  same = CONFIG.replace(block_len=4, reduction="serial", remat="block")  # the same results
  assert tvq.load_state(same, tmp_path / "state").logits.shape == (2, 11)


def test_a_file_of_a_later_version_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(tvq.TransformerConfig, "to_json", lambda self: '{"n_vocab": 11, "n_wing": 2}')
    tvq.save_state(state_after(CONFIG), CONFIG, tmp_path / "state")
  with pytest.raises(ValueError, match=r"incompatible version: .*unknown settings .'n_wing'"):
    tvq.load_state(CONFIG, tmp_path / "state")


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
  state = state_after(CONFIG)
  tvq.save_state(state, CONFIG, tmp_path / "state")
  before = (tmp_path / "state").read_bytes()

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(saved_state.files.os, "replace", fail)
  with pytest.raises(OSError, match=r"cannot write .*state: No space left on device"):
    tvq.save_state(tvq.initial_state(CONFIG, 1), CONFIG, tmp_path / "state")
  assert [path.name for path in tmp_path.iterdir()] == ["state"]
  assert (tmp_path / "state").read_bytes() == before


def test_what_does_not_fit_the_configuration_is_refused(tmp_path):
  file, state = tmp_path / "state", tvq.initial_state(CONFIG, 2)
  with pytest.raises(TypeError, match="state must be a TransformerState, got TransformerConfig"):
    tvq.save_state(CONFIG, state, file)
  with pytest.raises(TypeError, match=r"config must be .*, got str. Pass \(state, config, file\)"):
    tvq.save_state(state, "state", CONFIG)
  with pytest.raises(TypeError, match=r"load_state: config must be .* Pass \(config, file\)"):
    tvq.load_state(file, CONFIG)
  with pytest.raises(
    ValueError, match=r"state.attention_1.cache_counts must be float32\[1, 2, 1, 7\]"
  ):
    tvq.save_state(state, CONFIG.replace(n_code=7), file)
  with pytest.raises(ValueError, match=r"save_state: logits must have shape \[B=2, X=11\]"):
    tvq.save_state(state, CONFIG, file, logits=jnp.zeros((1, 11)))
  with pytest.raises(TypeError, match="save_state: pending must be a str or bytes, got 3"):
    tvq.save_state(state, CONFIG, file, pending=3)
  with pytest.raises(TypeError, match=r"save_state is not for use inside jax.jit"):
    jax.jit(lambda s: tvq.save_state(s, CONFIG, file))(state)
  assert not file.exists()
