"""The paper's model of images as 12,288 bytes, from their archives to bits per dimension.

python -m experiments.imagenet64 --data_dir=DIRECTORY                # trains, or goes on
python -m experiments.imagenet64 --data_dir=DIRECTORY --command=test
python -m experiments.imagenet64 --command=sample                    # draws a grid
python -m experiments.imagenet64 --smoke                             # the path, in seconds
"""

from __future__ import annotations

from absl import flags

from experiments import cli
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets

_N_TRAIN = flags.DEFINE_integer(
  "n_train",
  1_200_000,
  "How many images of train_data_batch_*.npz are for training; the others are for validation.",
  lower_bound=1,
)

_SIZE, _SMOKE_SIZE = 64, 8
_CPU = cli.SizePreset(
  # The memory holds more than a row of 192 bytes: the pixel above is the best guess there is.
  cli.TEXT_CPU.config.replace(d_model=192, d_v=384, pe_abs=True, block_len=256, mem_len=256),
  cli.TEXT_CPU.train_cfg.replace(
    n_max_step=3000, sequence_len=3 * _SIZE**2, update_len=1024, global_batch_size=1
  ),
  _SIZE,
)
_SMOKE = cli.SizePreset(
  cli.TEXT_SMOKE.config.replace(pe_abs=True),
  cli.TEXT_SMOKE.train_cfg.replace(sequence_len=3 * _SMOKE_SIZE**2, update_len=96),
  _SMOKE_SIZE,
)

flags.adopt_module_key_flags(cli)  # so that --help lists them

if __name__ == "__main__":
  cli.launch(
    cli.ExperimentSpec(
      name="imagenet64",
      source=lambda data_dir: data.DownsampledImages(data_dir, n_train=_N_TRAIN.value, size=_SIZE),
      smoke_source=lambda place: data.DownsampledImages(
        toy_datasets.write_images(place, size=_SMOKE_SIZE), n_train=48, size=_SMOKE_SIZE
      ),
      sizes={
        "paper": cli.SizePreset(
          tvq.TransformerConfig.imagenet64(), tvq.TrainConfig.imagenet64(), _SIZE
        ),
        "cpu": _CPU,
        "smoke": _SMOKE,
      },
      measures=("bits_per_dim",),
      token_name="dimension",
    )
  )
