"""Packed documents and padding: tokens of other documents, and padding, have no influence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import state as state_lib
from tvq_haiku.training import losses

import helpers
from helpers import VARIANTS, apply, tiny

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["heads", "absolute", "long memory", "no cache", "mha", "full"])
def test_packed_documents_equal_documents_alone(name):
  config = tiny(**VARIANTS[name])
  params = helpers.random_params(config)
  lengths = (13, 1, 30, 9)
  tokens = helpers.random_tokens(config, 1, sum(lengths))
  doc_ids = np.repeat([3, 4, 6, 7], lengths)[None].astype(np.int32)
  packed = apply(params, config, tokens, doc_ids=doc_ids)
  # In these windows, documents begin, end, or cover the whole window.
  state, windows = None, []
  for start, stop in ((0, 20), (20, 33), (33, 53)):
    out = apply(params, config, tokens[:, start:stop], state, doc_ids=doc_ids[:, start:stop])
    state = out.state
    windows.append(out.logits)
  np.testing.assert_allclose(jnp.concatenate(windows, axis=1), packed.logits, atol=2e-5)
  for document, length in zip((3, 4, 6, 7), lengths, strict=True):
    selected = doc_ids[0] == document
    # Padding up to the longest document lets one program serve every length.
    padded = np.zeros((1, 30), np.int32)
    padded[0, :length] = tokens[0, selected]
    ids = np.where(np.arange(30) < length, 0, -1)[None].astype(np.int32)
    alone = apply(params, config, padded, doc_ids=ids).logits[0, :length]
    np.testing.assert_allclose(packed.logits[0, selected], alone, atol=2e-5, err_msg=str(document))


@pytest.mark.parametrize("name", ["serial", "assoc_scan", "mqa", "grouped", "full"])
def test_gradients_and_states_of_packed_documents_equal_those_of_documents_alone(name):
  config = tiny(**VARIANTS.get(name, dict(reduction="serial", mem_len=6)) | dict(block_len=4))
  params = helpers.random_params(config)
  # All documents start at multiples of block_len, because the gradients of keys depend on block
  # boundaries.
  lengths = (16, 8, 24, 5)
  size = sum(lengths)
  tokens = helpers.random_tokens(config, 1, size)
  doc_ids = np.repeat([3, 4, 6, 7], lengths)[None].astype(np.int32)
  model, start = tvq.make_transformer(config), tvq.initial_state(config, 1)

  @jax.jit
  def read_document(tokens, doc_ids, document):
    def loss(params):
      out = model.apply(params, None, tokens, start, doc_ids)
      return jnp.sum(jnp.where(doc_ids == document, losses.token_nll(out.logits, tokens), 0.0)), out

    return jax.value_and_grad(loss, has_aux=True)(params)

  end = 0
  for document, length in zip((3, 4, 6, 7), lengths, strict=True):
    begin, end = end, end + length
    # All tokens after the document are padding, so that the state is the one at its end.
    ids = np.where(np.arange(size) < end, doc_ids, -1)
    (_, packed), gradients = read_document(tokens, ids, document)
    padded, ids = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
    padded[0, :length], ids[0, :length] = tokens[0, begin:end], document
    (_, alone), expected = read_document(padded, ids, document)
    np.testing.assert_allclose(packed.logits[0, begin:end], alone.logits[0, :length], atol=1e-5)
    helpers.assert_trees_close(gradients, expected)
    for got, wanted in zip(packed.state[2:], alone.state[2:], strict=True):
      if got is not None:
        got, wanted = state_of_document(got, document), state_of_document(wanted, document)
        helpers.assert_trees_close(got, wanted, atol=1e-5)


def state_of_document(state, document):
  """Returns the parts of the state of an attention that belong to one document."""
  in_document = state.memory_docs[:, :, None] == document  # [N, B, 1, M]
  selected = [
    jnp.where(in_document, state.memory_values.sum(-1), 0.0),
    jnp.where(in_document, state.memory_keys.sum(-1), 0.0),
  ]
  if hasattr(state, "cache_doc"):
    counts = jnp.where((state.cache_doc == document)[..., None, None], state.cache_counts, 0.0)
    selected += [counts, jnp.where(counts[..., None] > 0.0, state.cache_means, 0.0)]
  return selected


@pytest.mark.parametrize("doc_mask", [True, False])
def test_a_changed_token_changes_later_logits_of_its_document_only(doc_mask):
  config = tiny(doc_mask=doc_mask)
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 1, 50)
  doc_ids = np.repeat([0, 1, 2], [14, 20, 16])[None].astype(np.int32)
  changed = tokens.copy()
  changed[0, 20] = (tokens[0, 20] + 1) % config.n_vocab
  before, after = (apply(params, config, x, doc_ids=doc_ids).logits for x in (tokens, changed))
  differs = np.abs(before - after).max(-1)[0] > 0
  assert not differs[:20].any() and differs[20:34].all()
  assert differs[34:].any() != doc_mask


def test_the_loss_of_a_document_has_no_gradient_for_tokens_of_other_documents():
  config = tiny()
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 1, 50)
  doc_ids = np.repeat([0, 1, 2], [14, 20, 16])[None].astype(np.int32)

  @jax.jit
  @jax.grad
  def gradient(params, document):
    batch = dict(
      inputs=tokens, targets=tokens, doc_ids=doc_ids, loss_mask=(doc_ids == document).astype(int)
    )
    return tvq.training_loss(params, config, None, batch, tvq.initial_state(config, 1))[0]

  only_in_first = sorted(set(tokens[0, :14]) - set(tokens[0, 34:]))
  assert only_in_first
  for document, is_zero in ((0, False), (2, True)):
    embeddings = gradient(params, document)["transformer/embedding"]["embeddings"]
    assert (float(jnp.abs(embeddings[np.array(only_in_first)]).max()) == 0.0) == is_zero


def test_padding_anywhere_equals_no_padding():
  config = tiny(pe_abs=True)
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 3, 40)
  start = apply(params, config, tokens[:, :9]).state
  tokens = tokens[:, 9:]
  is_token = np.ones((3, 31), bool)
  is_token[0, :7] = False  # before the tokens
  is_token[1, 20:] = False  # after them
  is_token[2, ::3] = False  # between them
  noise = np.where(is_token, tokens, (tokens + 5) % config.n_vocab)
  doc_ids = np.where(is_token, 0, -1).astype(np.int32)
  padded = apply(params, config, noise, start, doc_ids=doc_ids)
  for i in range(3):

    def select(x, axis):
      return jax.lax.slice_in_dim(x, i, i + 1, axis=axis)

    selected = is_token[i]
    state = state_lib.map_batch_axis(select, start)
    alone = apply(params, config, tokens[i, selected][None], state)
    np.testing.assert_allclose(padded.logits[i, selected], alone.logits[0], atol=2e-5)
    helpers.assert_trees_close(state_lib.map_batch_axis(select, padded.state), alone.state)


def test_padding_changes_neither_loss_nor_gradients():
  config = tiny()
  params = helpers.random_params(config)
  tokens = helpers.random_tokens(config, 2, 24)
  doc_ids = np.zeros((2, 24), np.int32)
  doc_ids[1, 15:] = -1

  @jax.jit
  def gradients(tokens):
    batch = dict(inputs=tokens, targets=tokens, doc_ids=doc_ids, loss_mask=np.ones_like(doc_ids))
    return jax.value_and_grad(
      lambda p: tvq.training_loss(p, config, None, batch, tvq.initial_state(config, 2))[0]
    )(params)

  changed = np.where(doc_ids < 0, (tokens + 3) % config.n_vocab, tokens)
  helpers.assert_same(gradients(tokens), gradients(changed))
