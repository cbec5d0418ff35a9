"""Validation and derived values of the training configuration."""

import pytest

import tvq_haiku as tvq


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(optimizer="sgd"), "optimizer='sgd': must be one of"),
    (dict(lr_schedule="step"), "lr_schedule='step': must be one of"),
    (dict(lr_max=-1e-3), "lr_max=-0.001: must be at least 0"),
    (dict(wd_lam=-0.1), "wd_lam=-0.1: must be at least 0"),
    (dict(grad_clip=0.0), "grad_clip=0.0: must be positive, or None"),
    (dict(update_len=100), "sequence_len=512, update_len=100: update_len must divide"),
    (dict(n_warmup_step=1000), "n_warmup_step=1000, n_max_step=1000: n_warmup_step must be less"),
    (dict(n_extra_step=-1), "n_extra_step=-1: must be at least 0"),
    (dict(global_batch_size=0), "global_batch_size=0: must be at least 1"),
    (dict(n_accumulate=3), "global_batch_size=8, n_accumulate=3: n_accumulate must divide"),
  ],
)
def test_error_names_an_invalid_training_setting(changes, message):
  with pytest.raises(ValueError, match=message):
    tvq.TrainConfig(**changes)


def test_number_of_updates_includes_the_extra_ones():
  train_cfg = tvq.TrainConfig(n_max_step=1000, sequence_len=512, update_len=128)
  assert train_cfg.n_update == 1000 and train_cfg.updates_per_step == 4
  assert train_cfg.replace(n_extra_step=24).n_update == 1024
