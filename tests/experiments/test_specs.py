"""The settings of the experiments are those of the paper's code."""

import pytest

from experiments import enwik8, imagenet64, pg19

PAPER = {
  # setting: its values for enwik8, PG-19 and ImageNet64
  "optimizer": ("adamw", "adafactor", "adafactor"),
  "lr_max": (4e-4, 1e-2, 1e-2),
  "lr_schedule": ("cosine", "cosine", "cosine"),
  "grad_clip": (0.1, None, None),
  "wd_lam": (2e-4, 0.0, 0.0),
  "global_batch_size": (128, 128, 128),
  "sequence_len": (8192, 8192, 12_288),
  "update_len": (2048, 2048, 1536),
  "n_warmup_step": (10_000, 10_000, 10_000),
  "n_max_step": (125_000, 500_000, 500_000),
  "p_dropemb": (0.0, 0.0, 0.0),
  "p_dropsin": (0.2, 0.1, 0.1),
  "p_dropres": (0.5, 0.1, 0.0),
  "p_droplyr": (0.3, 0.1, 0.0),
  "pe_abs": (False, False, True),
  "e_tie": (False, True, True),
  "e_preln": (False, True, True),
  "e_scale": (1.0, 0.005, 0.005),
  "c_beta": (1e-4, 1e-4, 1e-4),
  "c_gamma": (0.99, 0.99, 0.99),
  "top_p": (0.9, 0.8, 0.999),
}


@pytest.mark.parametrize("name", PAPER)
def test_settings_of_the_paper(name):
  for module, value in zip((enwik8, pg19, imagenet64), PAPER[name], strict=True):
    preset = module.SPEC.presets["paper"]
    owners = [x for x in (preset.config, preset.train_cfg, module.SPEC) if hasattr(x, name)]
    assert len(owners) == 1
    assert getattr(owners[0], name) == value
