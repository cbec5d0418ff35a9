"""Numbers that are none, dead codes, damaged files, full disks, processes that die."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.model import quantizer
from tvq_haiku.parallel import sharding
from tvq_haiku.run import best_checkpoint, trainer
from tvq_haiku.training import losses, nan_debug
from tvq_haiku.training import train_step as train_step_lib

from damage import damage
import helpers
from helpers import assert_same
import privileges

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING


def poisoned(params, module="transformer/layers/attention_1/q", name="kernel"):
  """So large a weight that its products overflow."""
  return {**params, module: {**params[module], name: params[module][name].at[..., 0, 0].set(3e38)}}


class TestSkippedUpdates:
  def test_nothing_but_the_count_moves(self):
    params = poisoned(helpers.random_params(CONFIG))
    state = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0), params)
    want = jax.device_get(state)
    after, metrics = tvq.make_train_step(CONFIG, TRAIN)(
      state, next(helpers.run_batches()), jax.random.key(1)
    )
    assert metrics["skipped"].tolist() == [1.0, 1.0] and int(after.step) == 2
    assert_same(after.params, want.params)
    assert_same(after.opt_state, want.opt_state)

  def test_training_goes_on_after_one(self, monkeypatch):
    """A window whose loss is NaN leaves no trace in the state that the next one starts from."""
    loss = losses.training_loss

    def strange(config, params, rng, batch, state, **settings):
      value, aux = loss(config, params, rng, batch, state, **settings)
      bad = batch["inputs"][0, 0] == 7  # only in the first window below
      spoil = jnp.where(bad, jnp.nan, 1.0)
      spoiled = jax.tree.map(
        lambda x: x * spoil if jnp.issubdtype(x.dtype, jnp.floating) else x, aux.state
      )
      return value * spoil, aux._replace(state=spoiled, loss_lm=aux.loss_lm * spoil)

    monkeypatch.setattr(losses, "training_loss", strange)
    batch = next(helpers.run_batches())
    batch["inputs"][0, 0], batch["inputs"][0, 16] = 7, 8
    state = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0))
    state, metrics = tvq.make_train_step(CONFIG, TRAIN)(state, batch, jax.random.key(1))
    assert metrics["skipped"].tolist() == [1.0, 0.0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))

  @pytest.mark.parametrize(
    "module, name",
    [
      ("transformer/embedding", "embeddings"),
      ("transformer/layers/attention_1/quantizer", "c_sum"),
    ],
  )
  def test_a_gradient_alone_skips_an_update(self, monkeypatch, module, name):
    loss = losses.training_loss

    def strange(config, params, *args, **settings):
      value, aux = loss(config, params, *args, **settings)
      p = params[module][name]
      return value + jnp.sum(
        jnp.sqrt(p - jax.lax.stop_gradient(p))
      ), aux  # adds 0, with infinite slope

    monkeypatch.setattr(losses, "training_loss", strange)
    state = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0))
    want = jax.device_get(state.params)
    state, metrics = tvq.make_train_step(CONFIG, TRAIN)(
      state, next(helpers.run_batches()), jax.random.key(1)
    )
    assert np.isfinite(metrics["loss"]).all() and metrics["skipped"].tolist() == [1.0, 1.0]
    assert_same(state.params, want)

  def test_too_many_end_the_run_and_name_the_first_tensor(self, tmp_path, capsys):
    params = poisoned(helpers.random_params(CONFIG))
    begin = trainer.resume_or_initialize(CONFIG, TRAIN, tmp_path, params=params)
    with pytest.raises(
      tvq.NumericalError,
      match=(
        r"updates 1 to 4 were skipped, .*: the first non-finite tensor is the output of "
        r"transformer/layers/attention_1/q in layer 1: \d+ of \d+ values\. "
        r"No checkpoint was saved yet"
      ),
    ):
      trainer.fit(
        CONFIG,
        TRAIN,
        helpers.run_batches(),
        tmp_path,
        checkpoint=begin,
        options=trainer.TrainerOptions(max_skipped=4),
      )
    lines = capsys.readouterr().err
    assert (
      "warning: update 1 is skipped: loss nan, grad_norm nan" in lines and "update 4 is" in lines
    )

  @pytest.mark.parametrize("first, limit, update", [(3, 2, 4), (11, 1, 12)])
  def test_the_batch_that_is_to_blame_is_named(self, tmp_path, monkeypatch, first, limit, update):
    """In the middle of a run, when the next batch was computed already, and in the last batch."""
    loss = losses.training_loss

    def strange(config, params, rng, batch, state, **settings):
      value, aux = loss(config, params, rng, batch, state, **settings)
      return jnp.where(batch["targets"][0, 0] == 250, jnp.nan, 1.0) * value, aux

    class Batches:
      step = 0

      def __iter__(self):
        return self

      def __next__(self):
        self.step += 1
        batch = next(made)
        if self.step == (first + 1) // 2:
          batch["targets"][0, [0, 16]] = 250
        return batch

    made = helpers.run_batches()
    monkeypatch.setattr(losses, "training_loss", strange)
    jax.clear_caches()  # of programs without it
    with pytest.raises(
      tvq.NumericalError, match=rf"{update} w.* skipped, .*: the first .* is the loss: nan"
    ):
      trainer.fit(
        CONFIG, TRAIN, Batches(), tmp_path, options=trainer.TrainerOptions(max_skipped=limit)
      )

  def test_debug_nans_ends_at_the_first(self, tmp_path):
    begin = trainer.resume_or_initialize(
      CONFIG, TRAIN, tmp_path, params=poisoned(helpers.random_params(CONFIG))
    )
    with pytest.raises(tvq.NumericalError, match=r"updates 1 to 2 were .*attention_1/q in layer 1"):
      trainer.fit(
        CONFIG,
        TRAIN,
        helpers.run_batches(),
        tmp_path,
        checkpoint=begin,
        options=trainer.TrainerOptions(debug_nans=True),
      )

  def test_skipped_updates_are_counted_in_the_records(self, tmp_path):
    lines = []
    begin = trainer.resume_or_initialize(
      CONFIG, TRAIN, tmp_path, params=poisoned(helpers.random_params(CONFIG))
    )
    trainer.fit(
      CONFIG,
      TRAIN,
      helpers.run_batches(),
      tmp_path,
      checkpoint=begin,
      options=trainer.TrainerOptions(max_skipped=99, log_every=2),
      record=lambda step, values: lines.append((step, values)),
    )
    assert [(step, values["skipped"], values["skipped_since_start"]) for step, values in lines] == [
      (step, 1.0, step) for step in (2, 4, 6, 8, 10, 12)
    ]

  def test_what_is_looked_at(self):
    config = helpers.tiny(n_layer=2)
    tokens = helpers.random_tokens(config, 2, 16)
    batch, state = {"inputs": tokens, "targets": tokens}, tvq.initial_state(config, 2)
    params = helpers.random_params(config)

    def first(params, state=state):
      return nan_debug.first_non_finite(config, params, jax.random.key(0), batch, state)

    assert first(params) is None
    name = "transformer/layers/attention_2/out"
    second = {**params, name: {"kernel": params[name]["kernel"].at[1].multiply(3e38)}}
    assert first(second).startswith("output of transformer/layers/attention_2/out in layer 2")
    output = {**params["transformer/unembedding"], "bias": jnp.full(11, jnp.nan)}
    found = first({**params, "transformer/unembedding": output})
    assert found == "parameter transformer/unembedding/bias: 11 of 11 values"
    spoiled = state._replace(
      attention_1=state.attention_1._replace(
        cache_means=state.attention_1.cache_means.at[0, 0, 0, 0, 0].set(jnp.inf)
      )
    )
    assert first(params, spoiled).startswith("state.attention_1.cache_means: 1 of ")


class TestDeadCodes:
  def step(self, config, params):
    state = tvq.init_train_state(config, TRAIN, jax.random.key(0), params)
    return tvq.make_train_step(config, TRAIN.replace(lr_max=0.0, n_warmup_step=0))(
      state, next(helpers.run_batches()), jax.random.key(1)
    )[0].params

  def test_only_unused_codes_are_revived(self):
    config = CONFIG.replace(p_dropres=0.0, p_droplyr=0.0, c_revive=0.2)
    name = "transformer/layers/attention_1/quantizer"
    params = dict(helpers.random_params(config))
    q = params[name]
    params[name] = {
      "c_sum": q["c_sum"].at[0, 0, 2].set(1e3),
      "c_count": q["c_count"].at[0, 0, 2].set(0.1),
    }
    off, on = self.step(config.replace(c_revive=0.0), params)[name], self.step(config, params)[name]
    others = np.array([0, 1, 3, 4, 5])
    np.testing.assert_allclose(
      on["c_sum"][0, 0, others], off["c_sum"][0, 0, others], rtol=0.2, atol=0.2
    )
    assert float(off["c_count"][0, 0, 2]) < 0.2 and np.linalg.norm(off["c_sum"][0, 0, 2]) > 1e3
    # It became a key of norm 8^(1/4), and counts as used once; then it followed its keys for one update.
    code = on["c_sum"][0, 0, 2] / on["c_count"][0, 0, 2]
    assert 0.9 < float(on["c_count"][0, 0, 2]) < 2.0 and np.linalg.norm(code) < 2.0

  def test_none_from_padding(self):
    k = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    mask = jnp.array([[1, 0, 0, 0], [0, 0, 0, 0]])
    keys, is_token = quantizer._random_keys(jax.random.key(1), k, mask, 50)
    assert 0 < int(is_token.sum()) < 150
    for g in range(3):
      assert_same(keys[g][is_token[g]], jnp.broadcast_to(k[0, 0, g], (int(is_token[g].sum()), 5)))

  def test_not_from_parts_of_a_batch(self):
    with pytest.raises(ValueError, match=r"c_revive=0\.5 and n_accumulate=2"):
      tvq.make_train_step(CONFIG.replace(c_revive=0.5), TRAIN.replace(n_accumulate=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Two checkpoints of a run, of steps 8 and 12."""
  workdir = tmp_path_factory.mktemp("run")
  return workdir, trainer.fit(
    CONFIG, TRAIN, helpers.run_batches(), workdir, options=trainer.TrainerOptions(save_seconds=0.0)
  )


class TestDamage:
  # Orbax leaves coroutines behind when it fails.
  @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
  @pytest.mark.parametrize("kind", ["one bit flipped", "directory without permission"])
  def test_run_resumes_from_the_newest_intact_checkpoint(self, saved, tmp_path, capsys, kind):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    assert run_directory.saved_steps(workdir) == [10, 12]
    damage(workdir / "checkpoints" / "12", kind)
    with privileges.dropped():
      end = trainer.fit(CONFIG, TRAIN, helpers.run_batches(), workdir)
    assert f"warning: {workdir}/checkpoints/12 is damaged" in capsys.readouterr().err
    assert_same(end.train_state, saved[1].train_state)
    assert_same(tvq.load_checkpoint(workdir).train_state, saved[1].train_state)
    assert [p.name for p in (workdir / "damaged").iterdir()] == ["12"]

  def test_run_resumes_before_an_incomplete_checkpoint(self, saved, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    steps = workdir / "checkpoints"
    (steps / "12").rename(steps / "12.orbax-checkpoint-tmp-7")
    end = trainer.fit(CONFIG, TRAIN, helpers.run_batches(), workdir)
    assert_same(end.train_state, saved[1].train_state)

  def test_run_does_not_start_anew_if_all_checkpoints_are_damaged(self, saved, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    for step in ("10", "12"):
      damage(workdir / "checkpoints" / step, "empty")
    with pytest.raises(tvq.CheckpointError, match="No older checkpoint"):
      trainer.fit(CONFIG, TRAIN, helpers.run_batches(), workdir)
    assert run_directory.saved_steps(workdir) == [10, 12]

  def test_best_is_what_is_noted_even_if_a_later_one_is_there(self, tmp_path):
    """The process died before it noted its best, and went on from an older checkpoint."""
    state = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0))
    for step, loss in ((8, 2.0), (4, 1.0)):
      now = tvq.Checkpoint(
        CONFIG, TRAIN, state._replace(step=jnp.int32(step)), jax.random.key(1), 1
      )
      assert best_checkpoint.keep_best(tmp_path, now, loss)
      assert run_directory.saved_steps(tmp_path / "best") == [step]

  def test_how_it_is_computed_may_change(self, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    changed = CONFIG.replace(remat="layer", reduction="scan"), TRAIN.replace(n_accumulate=2)
    end = trainer.fit(*changed, helpers.run_batches(), tmp_path / "run")
    assert_same(end.train_state, saved[1].train_state)


class TestOtherMeshes:
  def test_a_run_goes_on_with_another_number_of_devices(self, tmp_path):
    config = CONFIG.replace(p_dropres=0.0, p_droplyr=0.0)
    whole = trainer.fit(config, TRAIN, helpers.run_batches(), tmp_path / "whole")
    for mesh, stop_at in (("fsdp:2,model:2", 2), (None, 6)):
      mesh = sharding.make_mesh(mesh) if mesh else None
      monkey = train_step_lib.make_train_step

      def limited(config, train_cfg, mesh, stop_at=stop_at):
        step = monkey(config, train_cfg, mesh)
        seen = []

        def count(state, batch, rng):
          seen.append(1)
          if int(state.step) // 2 + 1 == stop_at and stop_at < 6:
            os.kill(os.getpid(), 15)
          return step(state, batch, rng)

        count.n_compiled = step.n_compiled
        return count

      train_step_lib.make_train_step = limited
      try:
        end = trainer.fit(config, TRAIN, helpers.run_batches(), tmp_path / "run", mesh=mesh)
      finally:
        train_step_lib.make_train_step = monkey
      assert int(end.train_state.step) == 2 * stop_at
    again = tvq.load_checkpoint(tmp_path / "run", mesh=sharding.make_mesh("fsdp:4")).train_state
    assert again.params["transformer/unembedding"]["kernel"].sharding.spec[0] == "fsdp"
    assert_same(again, end.train_state)
    helpers.assert_trees_close(end.train_state.params, whole.train_state.params, atol=5e-5)
