"""Packed documents and padding: what may not be seen is not seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.training import losses

import helpers
from helpers import VARIANTS, apply, tiny


@pytest.mark.parametrize(
  "name", ["heads", "absolute", "long memory", "no cache", "matmul", "mha", "full"]
)
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


@pytest.mark.parametrize(
  "name", ["serial", "scan", "matmul", "assoc_scan", "mqa", "grouped", "full"]
)
def test_nothing_leaks_between_documents(name):
  """Logits, gradients and what is remembered of a document are those of the document alone."""
  config = tiny(**VARIANTS.get(name, dict(reduction="serial", mem_len=6)) | dict(block_len=4))
  params = helpers.random_params(config)
  # Starts at multiples of block_len: which queries a key learns from depends on block boundaries.
  lengths = (16, 8, 24, 5)
  size = sum(lengths)
  tokens = helpers.random_tokens(config, 1, size)
  doc_ids = np.repeat([3, 4, 6, 7], lengths)[None].astype(np.int32)
  model, start = tvq.make_transformer(config), tvq.initial_state(config, 1)

  @jax.jit
  def read(tokens, doc_ids, document):
    def loss(params):
      out = model.apply(params, None, tokens, start, doc_ids)
      return jnp.sum(jnp.where(doc_ids == document, losses.token_nll(out.logits, tokens), 0.0)), out

    return jax.value_and_grad(loss, has_aux=True)(params)

  end = 0
  for document, length in zip((3, 4, 6, 7), lengths):
    begin, end = end, end + length
    # Cut off behind the document, so that the state is the one at its end.
    (_, packed), gradients = read(tokens, np.where(np.arange(size) < end, doc_ids, -1), document)
    row, ids = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
    row[0, :length], ids[0, :length] = tokens[0, begin:end], document
    (_, alone), expected = read(row, ids, document)
    np.testing.assert_allclose(packed.logits[0, begin:end], alone.logits[0, :length], atol=1e-5)
    helpers.assert_trees_close(gradients, expected)
    for ours, theirs in zip(packed.state[2:], alone.state[2:]):
      if ours is not None:
        helpers.assert_trees_close(
          of_document(ours, document), of_document(theirs, document), atol=1e-5
        )


def of_document(state, document):
  """What a layer's state holds of it."""
  own = state.memory_docs[:, :, None] == document  # [N, B, 1, M]
  kept = [
    jnp.where(own, state.memory_values.sum(-1), 0.0),
    jnp.where(own, state.memory_keys.sum(-1), 0.0),
  ]
  if hasattr(state, "cache_doc"):
    counts = jnp.where((state.cache_doc == document)[..., None, None], state.cache_counts, 0.0)
    kept += [counts, jnp.where(counts[..., None] > 0.0, state.cache_means, 0.0)]
  return kept


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
    batch = dict(
      inputs=jnp.asarray(tokens), targets=jnp.asarray(tokens), doc_ids=doc_ids, loss_mask=mask
    )
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
      one(warm.document, 0),
      one(warm.position, 0),
      *(jax.tree.map(lambda x: one(x, 1), s) for s in (warm.attention_1, warm.attention_2)),
    )
    alone = apply(config, params, tokens[row, real[row]][None], state)
    np.testing.assert_allclose(padded.logits[row, real[row]], alone.logits[0], atol=2e-5)
    got = tvq.TransformerState(
      one(padded.state.document, 0),
      one(padded.state.position, 0),
      *(
        jax.tree.map(lambda x: one(x, 1), s)
        for s in (padded.state.attention_1, padded.state.attention_2)
      ),
    )
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
    return jax.value_and_grad(
      lambda p: tvq.training_loss(config, p, None, batch, tvq.initial_state(config, 2))[0]
    )(params)

  other = np.where(doc_ids < 0, (tokens + 3) % config.n_vocab, tokens)
  jax.tree.map(np.testing.assert_array_equal, gradients(tokens), gradients(other))
