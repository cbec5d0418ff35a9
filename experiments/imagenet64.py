"""Trains the paper's model of 64 x 64 images (12,288 bytes each), and reports bits per dimension.

python -m experiments.imagenet64 --data_dir=DIRECTORY                # train, or resume
python -m experiments.imagenet64 --data_dir=DIRECTORY --command=test
python -m experiments.imagenet64 --command=sample                    # write a grid of images
python -m experiments.imagenet64 --smoke                             # check everything in seconds
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from absl import flags

from experiments import cli, specs
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets

_N_TRAIN = flags.DEFINE_integer(
  "n_train",
  1_200_000,
  "Number of images in train_data_batch_*.npz to train on; the rest are the validation split.",
  lower_bound=1,
)

_IMAGE_SIZE, _SMOKE_IMAGE_SIZE = 64, 8  # pixels
_SMOKE_TRAIN_IMAGES = 48

_CPU = specs.SizePreset(
  # The memory is longer than one row of an image (192 bytes), so that it contains the pixel above,
  # which is the best predictor of a pixel.
  specs.TEXT_CPU.config.replace(d_model=192, d_v=384, pe_abs=True, block_len=256, mem_len=256),
  specs.TEXT_CPU.train_cfg.replace(
    n_max_step=3000, sequence_len=3 * _IMAGE_SIZE**2, update_len=1024, global_batch_size=1
  ),
  _IMAGE_SIZE,
)
_SMOKE = specs.SizePreset(
  specs.TEXT_SMOKE.config.replace(pe_abs=True),
  specs.TEXT_SMOKE.train_cfg.replace(sequence_len=3 * _SMOKE_IMAGE_SIZE**2, update_len=96),
  _SMOKE_IMAGE_SIZE,
)

SPEC = specs.ExperimentSpec(
  name="imagenet64",
  source=lambda data_dir: data.DownsampledImages(
    data_dir, n_train=_N_TRAIN.value, size=_IMAGE_SIZE
  ),
  smoke_source=lambda directory: data.DownsampledImages(
    toy_datasets.write_images(directory, size=_SMOKE_IMAGE_SIZE),
    n_train=_SMOKE_TRAIN_IMAGES,
    size=_SMOKE_IMAGE_SIZE,
  ),
  presets={
    "paper": specs.SizePreset(
      tvq.TransformerConfig.imagenet64(), tvq.TrainConfig.imagenet64(), _IMAGE_SIZE
    ),
    "cpu": _CPU,
    "smoke": _SMOKE,
  },
  measures=("bits_per_dim",),
  token_name="dimension",
  top_p=0.999,
)

if __name__ == "__main__":
  cli.launch(SPEC)
