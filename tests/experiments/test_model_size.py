"""The line about a small default model, and the warning about a large one."""

import types

import pytest

from experiments import enwik8, model_size, text
from tvq_haiku.model import remat


@pytest.mark.parametrize(
  "spec, size, says_size, warns",
  [
    (text.SPEC, None, True, False),
    (text.SPEC, "cpu", False, False),
    (text.SPEC, "paper", False, True),
    (enwik8.SPEC, None, False, True),
  ],
)
def test_default_size_and_lack_of_memory_are_logged(
  monkeypatch, capsys, spec, size, says_size, warns
):
  monkeypatch.setattr(remat, "device_memory_bytes", lambda device: 20 * 10**9)
  preset = spec.presets[size or spec.default_size]
  experiment = types.SimpleNamespace(config=preset.config, train_cfg=preset.train_cfg, mesh=None)
  flags = types.SimpleNamespace(size=size, smoke=False, train=types.SimpleNamespace(init=None))
  model_size.log_size(types.SimpleNamespace(spec=spec, flags=flags), experiment)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == says_size + warns
  assert any("of 20 GB of memory. --size=paper selects" in line for line in lines) == says_size
  assert any("warning: training needs about" in line for line in lines) == warns
