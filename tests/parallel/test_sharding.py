"""Eight devices compute what one does: parameters, codebook and losses after several steps."""

import functools
import re
import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.attention import sharded
from tvq_haiku.parallel import sharding
from tvq_haiku.training import gradients as gradients_lib
from tvq_haiku.training import train_step as train_step_lib

import helpers

CONFIG = helpers.tiny(n_layer=1, p_dropres=0.1, p_dropsin=0.1, p_droplyr=0.1, p_dropemb=0.1)
TRAIN = tvq.TrainConfig(
  n_warmup_step=1, n_max_step=12, sequence_len=128, update_len=64, global_batch_size=8, lr_max=1e-2
)
MESHES = (
  "data:2",
  "data:4",
  "data:8",
  "fsdp:8",
  "sequence:8",
  "data:4,model:2",
  "data:2,sequence:2,model:2",
)
HEADS = {
  "shga": CONFIG,
  "heads": CONFIG.replace(n_head=2, d_v=8),
  "mha": CONFIG.replace(head_type="mha", n_head=2, d_v=8),
  "mqa": CONFIG.replace(head_type="mqa", n_head=2, d_v=8),
  "grouped, tied": CONFIG.replace(
    head_type="mha", n_head=4, n_kv_head=2, d_v=8, e_tie=True, e_preln=True, pe_abs=True, n_vocab=16
  ),
}


def batches(config, n=3, train_cfg=TRAIN):
  """Documents that begin anywhere, and padding at the end of some rows."""
  for seed in range(n):
    rng = np.random.default_rng(seed)
    shape = (train_cfg.global_batch_size, train_cfg.sequence_len)
    tokens = helpers.random_tokens(config, shape[0], shape[1] + 1, seed=seed)
    docs = np.sort(rng.integers(0, 3, shape), axis=1).astype(np.int32)
    docs[1, 100:] = docs[3, 30:] = -1
    yield {
      "inputs": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "doc_ids": docs,
      "loss_mask": np.ones(shape, np.int32),
    }


def train_on(mesh, config, train_cfg=TRAIN):
  mesh = sharding.make_mesh(mesh) if mesh else None
  state = tvq.init_train_state(config, train_cfg, jax.random.key(0), mesh=mesh)
  step = tvq.make_train_step(config, train_cfg, mesh)
  losses = []
  for batch in batches(config, train_cfg=train_cfg):
    state, metrics = step(state, batch, jax.random.key(1))
    losses += metrics["loss_lm"].tolist()
  assert step.n_compiled() == 1
  return jax.device_get(state), losses


one_device = functools.cache(functools.partial(train_on, None))


def assert_equal_runs(got, want):
  np.testing.assert_allclose(got[1], want[1], atol=1e-5, rtol=0)
  helpers.assert_trees_close(got[0].params, want[0].params, atol=5e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_equals_one_device(mesh):
  config = HEADS["mqa"] if mesh in ("data:2", "data:4") else CONFIG
  assert_equal_runs(train_on(mesh, config), one_device(config))


def gradients_on(mesh, config):
  """Loss, state and gradients of one window, with dropout."""
  mesh = sharding.make_mesh(mesh) if mesh else None
  params, batch = helpers.random_params(config), next(batches(config))
  args = (params, {name: x[:, :64] for name, x in batch.items()}, tvq.initial_state(config, 8))
  args = args if mesh is None else jax.device_put(args, sharding.replicated(mesh))

  def function(params, batch, state):
    with sharding.use_mesh(mesh):
      return gradients_lib.loss_gradients(
        config, params, jax.random.key(3), batch, state, sequence_rng=jax.random.key(4)
      )

  return jax.device_get(jax.jit(function)(*args))


gradients_on_one = functools.cache(functools.partial(gradients_on, None))


@pytest.mark.parametrize(
  "heads, mesh",
  [
    *((heads, "fsdp:4,model:2") for heads in HEADS),
    ("heads", "data:2,sequence:4"),
    ("mha", "data:2,sequence:4"),
  ],
)
def test_every_head_type_equals_one_device(heads, mesh):
  helpers.assert_trees_close(gradients_on(mesh, HEADS[heads]), gradients_on_one(HEADS[heads]))


@pytest.mark.parametrize(
  "change",
  [
    dict(reduction="scan"),
    dict(agg_cache=False),
    dict(grad_thru_cache=False),
    dict(remat="layer", n_layer=2),
  ],
  ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)
def test_model_and_sequence_parallel_with_any_setting(change):
  config = HEADS["mqa"].replace(**change)
  helpers.assert_trees_close(gradients_on("sequence:4,model:2", config), gradients_on_one(config))


def test_adafactor_on_a_mesh():
  train_cfg = TRAIN.replace(optimizer="adafactor", lr_max=1e-3, wd_lam=1e-4)
  config = HEADS["mqa"]
  got, want = train_on("fsdp:4,model:2", config, train_cfg), train_on(None, config, train_cfg)
  np.testing.assert_allclose(got[1], want[1], atol=2e-5, rtol=0)


def test_full_attention_on_a_mesh():
  config = CONFIG.replace(attn_type="full", mem_len=64)
  helpers.assert_trees_close(gradients_on("data:4,model:2", config), gradients_on_one(config))


class TestAttention:
  """The pieces of a sequence, against one device: values, state and gradients."""

  def inputs(self, lengths=None, T=64):
    rng = np.random.default_rng(0)
    B, H, G, K, V, S, M = 2, 2, 2, 4, 6, 5, 7

    def normal(*shape):
      return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    first = tvq.vq_attention(
      normal(B, 20, H, K),
      normal(B, 20, G, K),
      normal(B, 20, G, V),
      normal(G, S, K),
      mem_len=M,
      block_len=4,
    )
    arrays = (normal(B, T, H, K), normal(B, T, G, K), normal(B, T, G, V), normal(G, S, K))
    others = dict(
      state=first.state,
      relative_keys=normal(M + 1, G, K),
      content_bias=normal(H, K),
      position_bias=normal(H, K),
      lengths=None if lengths is None else jnp.asarray(lengths),
    )
    return arrays, others, (normal(B, T, H, V), normal(B, G, S, V))

  @pytest.mark.parametrize(
    "mesh, T, lengths, documents",
    [
      ("sequence:8", 64, None, None),
      ("sequence:8", 64, (0, 43), None),
      ("sequence:8", 64, (50, 8), 3),
      ("data:2,sequence:2,model:2", 64, (50, 8), 3),
      ("sequence:8", 24, (20, 8), 3),
    ],
  )
  def test_equals_one_device(self, mesh, T, lengths, documents):
    arrays, others, (d_values, d_means) = self.inputs(lengths, T)
    if documents:
      docs = np.random.default_rng(1).integers(0, documents, (2, T))
      others["segment_ids"] = jnp.asarray(np.sort(docs, axis=1), jnp.int32)

    def attend(arrays, others, mesh):
      def function(arrays, others):
        with sharding.use_mesh(mesh):
          return sharded.sharded_attention(tvq.vq_attention, *arrays, **others, block_len=4)

      def loss(arrays, others):
        out = function(arrays, others)
        is_read = jnp.arange(T) < (T if lengths is None else others["lengths"][:, None])
        values = jnp.where(jnp.broadcast_to(is_read, (2, T))[..., None, None], out.values, 0.0)
        return jnp.sum(values * d_values) + jnp.sum(out.state.cache_means * d_means), (
          values,
          out.state,
        )

      if mesh is not None:
        arrays, others = jax.device_put((arrays, others), sharding.replicated(mesh))
      (_, out), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays, others)
      return jax.device_get((out, slopes))

    want = attend(arrays, others, None)
    got = attend(arrays, others, sharding.make_mesh(mesh))
    helpers.assert_trees_close(got[0], want[0])
    helpers.assert_trees_close(got[1], want[1], atol=5e-5)

  def test_pieces_are_exchanged_not_gathered(self):
    """What devices tell each other does not grow with the sequence."""
    arrays, others, _ = self.inputs()
    mesh = sharding.make_mesh("sequence:8")

    def function(arrays, others):
      with sharding.use_mesh(mesh):
        return sharded.sharded_attention(tvq.vq_attention, *arrays, **others, block_len=4).values

    spec = jax.NamedSharding(mesh, P(None, "sequence"))
    arrays = tuple(jax.device_put(x, spec) for x in arrays[:3]) + arrays[3:]
    others = jax.device_put(others, sharding.replicated(mesh))
    text = jax.jit(function).lower(arrays, others).compile().as_text()
    assert "collective-permute" in text and "all-gather" not in text


def test_fully_sharded_parameters_are_born_in_pieces():
  config = tvq.TransformerConfig.tiny(n_layer=1, d_model=64, n_vocab=256)
  state = tvq.init_train_state(config, TRAIN, jax.random.key(0), mesh=sharding.make_mesh("fsdp:8"))
  of_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  of_all = sum(x.nbytes for x in jax.tree.leaves(state))
  assert of_one < 0.2 * of_all  # vectors and the codebook are whole everywhere


def test_state_is_dealt_out():
  mesh = sharding.make_mesh("data:4,model:2")
  shapes = jax.eval_shape(lambda: tvq.initial_state(CONFIG, 8))
  state = sharding.state_shardings(shapes, mesh, CONFIG.kv_heads)
  assert state.attention_1.cache_means.spec == P(None, "data", None, None, "model")
  state = sharding.state_shardings(shapes, mesh, 2)
  assert state.attention_1.memory_keys.spec == P(None, "data", None, None, None)  # 1 head: not cut
  assert state.document.spec == P("data")


def test_evaluation_on_a_mesh():
  params = helpers.random_params(CONFIG)
  stream = data.stream_of([np.arange(300) % 11])
  want = tvq.evaluate(CONFIG, params, stream, batch_size=4, window_len=64)
  mesh = sharding.make_mesh("data:4,model:2")
  params = jax.device_put(params, sharding.replicated(mesh))
  got = tvq.evaluate(CONFIG, params, stream, batch_size=4, window_len=64, mesh=mesh)
  assert got.tokens == want.tokens and abs(got.nats - want.nats) < 1e-3


def test_writing_with_parameters_in_pieces():
  config = HEADS["mha"]
  params, prompts = helpers.random_params(config), helpers.random_tokens(config, 2, 13)
  shapes = train_step_lib.train_state_shapes(config, TRAIN)
  shardings = sharding.train_state_shardings(shapes, sharding.make_mesh("fsdp:2,model:2")).params
  want, got = (
    tvq.generate(p, config, prompts, max_new_tokens=9, rng=jax.random.key(0), temperature=0.8)
    for p in (params, jax.device_put(params, shardings))
  )
  helpers.assert_same(got.tokens, want.tokens)
  np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_parts_of_a_batch_in_turn_are_the_batch():
  config = HEADS["mqa"].replace(p_dropres=0.0, p_dropsin=0.0, p_droplyr=0.0, p_dropemb=0.0)
  want = one_device(config)
  assert_equal_runs(train_on(None, config, TRAIN.replace(n_accumulate=4)), want)
  assert_equal_runs(train_on("data:4,model:2", config, TRAIN.replace(n_accumulate=2)), want)


@pytest.mark.parametrize(
  "text, message",
  [
    ("data:16", "for 16 devices, and there are 8"),
    ("data", r"'data' must be AXIS:SIZE"),
    ("rows:2", r"'rows:2' must be AXIS:SIZE with an axis of data, fsdp, model, sequence"),
    ("data:2,data:2", "each at most once"),
    ("data:0", "AXIS:SIZE"),
    ("data:²", "AXIS:SIZE"),
    ("", "AXIS:SIZE"),
  ],
)
def test_meshes_that_cannot_be(text, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(text)


@pytest.mark.parametrize(
  "mesh, model, change, message",
  [
    ("data:3", {}, {}, "3 devices cannot share the rows of global_batch_size=8"),
    ("data:8", {}, dict(n_accumulate=2), "with n_accumulate=2 evenly"),
    ("model:3", {}, {}, "share neither 1 key/value heads nor d_v=16"),
    (
      "sequence:8",
      dict(mem_len=3),
      dict(update_len=32),
      "update_len=32 in 8 pieces: each must be a",
    ),
    ("sequence:8", dict(block_len=4), dict(update_len=32), "block_len=4 and at least mem_len=8"),
    ("sequence:8", dict(attn_type="full", mem_len=64), {}, "attn_type='full' must be 'vq'"),
  ],
)
def test_sizes_that_do_not_go_together(mesh, model, change, message):
  with pytest.raises(ValueError, match=message):
    tvq.make_train_step(CONFIG.replace(**model), TRAIN.replace(**change), mesh)


def test_hosts_get_the_rows_of_their_devices(monkeypatch):
  assert sharding.process_share(None, 8) == (0, 1)
  mesh = sharding.make_mesh("data:4,model:2")
  assert sharding.process_share(mesh, 8) == (0, 1)
  for first, want in ((4, (1, 2)), (2, None)):
    rows = {i: (slice(first + 2 * i, first + 2 * i + 2), slice(None)) for i in range(2)}
    here = types.SimpleNamespace(addressable_devices_indices_map=lambda shape, rows=rows: rows)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh, n_row, here=here: here)
    if want:
      assert sharding.process_share(mesh, 8) == want
    else:
      with pytest.raises(
        ValueError, match="gives this host rows 2 to 6 of 8, which is no even share"
      ):
        sharding.process_share(mesh, 8)


def test_every_parameter_finds_its_rule():
  """A rule that no parameter meets, or a kernel that meets none, is a slip."""
  shapes = {
    f"{module}/{name}": leaf.shape
    for config in (CONFIG, HEADS["mha"], CONFIG.replace(e_tie=True))
    for module, leaves in tvq.params_shapes(config).items()
    for name, leaf in leaves.items()
  }
  for path in shapes:
    rule = next(pattern for pattern, _ in sharding.PARAM_RULES if re.search(pattern, path))
    assert (rule == "") == (not path.endswith(("kernel", "embeddings"))), path
  for pattern, _ in sharding.PARAM_RULES:
    assert any(re.search(pattern, path) for path in shapes), pattern


def test_what_the_optimizer_keeps_is_cut_like_its_parameter():
  mesh = sharding.make_mesh("fsdp:4,model:2")
  shapes = train_step_lib.train_state_shapes(CONFIG, TRAIN)
  shardings = sharding.train_state_shardings(shapes, mesh)
  name = "transformer/layers/attention_1/out"
  want = shardings.params[name]["kernel"].spec
  assert want == P(None, "model", "fsdp")
  moments = [
    s.spec
    for path, s in jax.tree_util.tree_leaves_with_path(shardings.opt_state)
    if name in jax.tree_util.keystr(path)
  ]
  assert moments == [want, want]
