"""The name of the first non-finite tensor, and the end of training after skipped updates."""

import jax
import jax.numpy as jnp
import pytest

import tvq_haiku as tvq
from tvq_haiku.run import trainer
from tvq_haiku.training import losses, nan_debug

import helpers

pytestmark = pytest.mark.slow

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING


class TestFirstNonFinite:
  config = helpers.tiny(n_layer=2)

  def find(self, params, state=None, config=config):
    tokens = helpers.random_tokens(config, 2, 16)
    batch = {"inputs": tokens, "targets": tokens}
    state = tvq.initial_state(config, 2) if state is None else state
    return nan_debug.first_non_finite(params, config, jax.random.key(0), batch, state)

  def test_none_if_all_values_are_finite(self):
    assert self.find(helpers.random_params(self.config)) is None

  def test_a_parameter(self):
    params = helpers.random_params(self.config)
    output = {**params["transformer/unembedding"], "bias": jnp.full(11, jnp.nan)}
    found = self.find({**params, "transformer/unembedding": output})
    assert found == "parameter transformer/unembedding/bias: 11 of 11 values"

  def test_the_state(self):
    state = tvq.initial_state(self.config, 2)
    means = state.attention_1.cache_means.at[0, 0, 0, 0, 0].set(jnp.inf)
    state = state._replace(attention_1=state.attention_1._replace(cache_means=means))
    found = self.find(helpers.random_params(self.config), state)
    assert found == f"state.attention_1.cache_means: 1 of {means.size} values"

  def test_the_output_of_a_module_in_a_layer(self):
    params, name = helpers.random_params(self.config), "transformer/layers/attention_2/out"
    kernel = params[name]["kernel"].at[1].multiply(3e38)
    found = self.find({**params, name: {"kernel": kernel}})
    assert found.startswith("output of transformer/layers/attention_2/out in layer 2: ")

  def test_the_output_of_a_module_outside_of_the_layers(self):
    params = helpers.random_params(self.config)
    output = params["transformer/unembedding"]
    output = {**output, "kernel": output["kernel"].at[0].set(3e38).at[1].set(3e38)}
    found = self.find({**params, "transformer/unembedding": output})
    assert found.startswith("output of transformer/unembedding: ")

  @pytest.mark.parametrize("name", ["loss_lm", "loss_commit"])
  def test_a_loss(self, monkeypatch, name):
    original = losses.training_loss

    def non_finite(*args, **kwargs):
      loss, aux = original(*args, **kwargs)
      return loss, aux._replace(**{name: jnp.array(jnp.inf)})

    monkeypatch.setattr(losses, "training_loss", non_finite)
    assert self.find(helpers.random_params(self.config)) == f"{name}: inf"

  def test_a_gradient(self, monkeypatch):
    original = losses.training_loss

    def infinite_slope(params, config, *args, **kwargs):
      loss, aux = original(params, config, *args, **kwargs)
      p = params["transformer/embedding"]["embeddings"][:3]
      return loss + jnp.sum(jnp.sqrt(p - jax.lax.stop_gradient(p))), aux  # adds 0

    monkeypatch.setattr(losses, "training_loss", infinite_slope)
    config = helpers.tiny(n_layer=1)  # no gradient was compiled for it with the original loss
    found = self.find(helpers.random_params(config), config=config)
    assert found == "gradient of transformer/embedding/embeddings: 48 of 176 values"


class TestTraining:
  """`trainer.fit` counts skipped updates, and ends when there are too many in a row."""

  def fit(self, workdir, record=None, **options):
    checkpoint = trainer.resume_or_initialize(
      CONFIG, TRAIN, workdir, params=helpers.overflowing_params(CONFIG)
    )
    return trainer.fit(
      CONFIG,
      TRAIN,
      helpers.run_batches(),
      workdir,
      checkpoint=checkpoint,
      options=trainer.TrainerOptions(**options),
      record=record,
    )

  def test_too_many_in_a_row_end_the_run_and_the_tensor_is_named(self, tmp_path, capsys):
    with pytest.raises(
      tvq.NumericalError,
      match=(
        r"updates 1 to 4 were skipped, .*: the first non-finite tensor is the output of "
        r"transformer/layers/attention_1/q in layer 1: \d+ of \d+ values\. "
        r"No checkpoint was saved yet"
      ),
    ):
      self.fit(tmp_path, max_skipped=4)
    lines = capsys.readouterr().err
    assert "warning: update 1 is skipped: loss nan, grad_norm nan" in lines
    assert "update 4 is" in lines

  @pytest.mark.parametrize("first, limit, last", [(3, 2, 4), (11, 1, 12)])
  def test_the_batch_of_the_skipped_updates_is_examined(
    self, tmp_path, monkeypatch, first, limit, last
  ):
    """They are in the middle of a run, when the next step has already started, or at its end."""
    original = losses.training_loss

    def non_finite(params, config, rng, batch, state, **settings):
      loss, aux = original(params, config, rng, batch, state, **settings)
      return jnp.where(batch["targets"][0, 0] == 250, jnp.nan, 1.0) * loss, aux

    class Batches:
      step = 0

      def __init__(self):
        self._batches = helpers.run_batches()

      def __iter__(self):
        return self

      def __next__(self):
        self.step += 1
        batch = next(self._batches)
        if self.step == (first + 1) // 2:
          batch["targets"][0, [0, 16]] = 250
        return batch

    monkeypatch.setattr(losses, "training_loss", non_finite)
    jax.clear_caches()  # programs that were compiled with the original loss
    with pytest.raises(tvq.NumericalError, match=rf"{last} w.* skipped, .* loss: nan"):
      trainer.fit(
        CONFIG, TRAIN, Batches(), tmp_path, options=trainer.TrainerOptions(max_skipped=limit)
      )

  def test_debug_nans_ends_the_run_at_the_first_skipped_update(self, tmp_path):
    with pytest.raises(tvq.NumericalError, match=r"updates 1 to 2 were .*attention_1/q in layer 1"):
      self.fit(tmp_path, debug_nans=True)

  def test_skipped_updates_are_counted_in_the_metrics(self, tmp_path):
    records = []
    self.fit(
      tmp_path,
      max_skipped=99,
      log_every=2,
      record=lambda step, values: records.append((step, values)),
    )
    counts = [(step, r["skipped"], r["skipped_since_start"]) for step, r in records]
    assert counts == [(step, 1.0, step) for step in (2, 4, 6, 8, 10, 12)]
