"""Writes text from a checkpoint.

  python -m experiments.sample --checkpoint=runs/quickstart --prompt='The Admiral '
"""

from __future__ import annotations

from absl import flags
import jax

from experiments import launcher
import tvq_haiku as tvq

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a run.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to go on from; may be given several times.")
_LENGTH = flags.DEFINE_integer("length", 500, "Bytes to write, at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest byte.", lower_bound=0.0)
_TOP_P = flags.DEFINE_float(
    "top_p", 0.95, "Nucleus of the likeliest bytes.", lower_bound=0.0, upper_bound=1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Another seed, another text.", lower_bound=0)


def main() -> None:
  run = tvq.load_checkpoint(_CHECKPOINT.value)
  texts = tvq.continue_text(
      run.train_state.params, run.config, _PROMPT.value, max_new_tokens=_LENGTH.value,
      rng=jax.random.key(_SEED.value), temperature=_TEMPERATURE.value, top_p=_TOP_P.value)
  for prompt, text in zip(_PROMPT.value, texts):
    print(prompt + text)


if __name__ == "__main__":
  launcher.launch("sample", main)
