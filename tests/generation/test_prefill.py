"""Tests of reading prompts of different lengths."""

import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.generation import prefill

import helpers

CONFIG = helpers.tiny()
PARAMS = helpers.random_params(CONFIG)


def test_prompts_in_several_windows_are_read_like_each_prompt_alone(monkeypatch):
  monkeypatch.setattr(prefill, "_MAX_WINDOW_LEN", 16)
  tokens, lengths = helpers.random_tokens(CONFIG, 2, 50), (50, 20)
  prompts = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
  state, logits = prefill.prefill(PARAMS, CONFIG, prompts, tvq.initial_state(CONFIG, 2))
  np.testing.assert_array_equal(state.position, lengths)
  for b, prompt in enumerate(prompts):
    alone = helpers.apply(PARAMS, CONFIG, prompt[None])
    np.testing.assert_allclose(logits[b], alone.logits[0, -1], atol=2e-5)


def test_an_empty_prompt_keeps_its_state_and_logits():
  state = helpers.apply(PARAMS, CONFIG, helpers.random_tokens(CONFIG, 2, 9)).state
  logits = jnp.arange(22.0).reshape(2, 11)
  prompts = [np.array([3, 4], np.int32), np.array([], np.int32)]
  new_state, new_logits = prefill.prefill(PARAMS, CONFIG, prompts, state, logits)
  np.testing.assert_array_equal(new_logits[1], logits[1])
  assert (new_logits[0] != logits[0]).all()
  np.testing.assert_array_equal(new_state.position, [11, 9])
  for got, expected in zip(new_state.attention_1, state.attention_1, strict=True):
    np.testing.assert_array_equal(got[:, 1], expected[:, 1])


def test_an_empty_prompt_becomes_an_eos_only_at_the_start_of_a_text():
  empty, prompt = np.array([], np.int32), np.array([3], np.int32)
  new = tvq.initial_state(CONFIG, 2)
  filled = prefill.fill_empty_prompts([prompt, empty], new, eos_ids=[1, 2])
  assert [x.tolist() for x in filled] == [[3], [1]]
  with pytest.raises(ValueError, match=r"prompts\[1\] is empty: pass an `eos_id`"):
    prefill.fill_empty_prompts([prompt, empty], new, eos_ids=[])
  state = new._replace(document=jnp.array([-1, 0]))
  with pytest.raises(ValueError, match=r"prompts\[1\] is empty, .* pass the `logits`"):
    prefill.fill_empty_prompts([prompt, empty], state, eos_ids=[1])


def test_padding_is_removed_from_prompts():
  tokens = np.array([[5, 6, 7], [8, 0, 0]], np.int64)
  prompts = prefill.unpad_prompts(tokens, [3, 1], n_vocab=11)
  assert [x.tolist() for x in prompts] == [[5, 6, 7], [8]]
  assert all(x.dtype == np.int32 for x in prompts)
  assert [x.size for x in prefill.unpad_prompts(np.zeros((2, 0)), None, n_vocab=11)] == [0, 0]


@pytest.mark.parametrize(
  "prompts, lengths, error, message",
  [
    ([5, 6], None, ValueError, r"prompts must be \[B, P\] with B >= 1, got shape \(2,\)"),
    (np.zeros((0, 3), int), None, ValueError, r"got shape \(0, 3\)"),
    ([[5, 6]], [1.0], TypeError, "lengths must be integers, got float64"),
    ([[5, 6]], [3], ValueError, r"lengths=\[3\] must be one integer in \[0, 2\] for each of 1"),
    ([[5, 6]], [-1], ValueError, r"lengths=\[-1\]"),
    ([[5, 6]], [1, 1], ValueError, r"lengths=\[1, 1\]"),
    ([[5, 11]], None, ValueError, r"\[0, 11\), got 5...11"),
    ([[5.0]], None, TypeError, "tokens must be integers, got float64"),
    ([[5, 6], [7]], None, ValueError, r"prompts has rows of different lengths: pad .* `lengths`"),
    ([[5, 6]], [[1], [1, 2]], ValueError, "lengths has rows of different lengths"),
    ("text", None, TypeError, "prompts must be integers, got text: pass it to continue_text"),
    (["a", "b"], None, TypeError, "prompts must be integers, got text"),
    ([b"a"], None, TypeError, "prompts must be integers, got text"),
    (None, None, ValueError, r"prompts must be \[B, P\] with B >= 1, got shape \(\)"),
  ],
)
def test_invalid_prompts_are_refused(prompts, lengths, error, message):
  with pytest.raises(error, match=f"generate: .*{message}"):
    prefill.unpad_prompts(prompts, lengths, n_vocab=11)
