"""Frozen configurations: what the model is, and how it is trained.

Field names are those of the paper's code, so that its settings can be pasted in.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from typing import Any, Self

import jax.numpy as jnp
import jmp

_PRECISIONS = {
  "float32": "params=float32,compute=float32,output=float32",
  "bfloat16": "params=float32,compute=bfloat16,output=bfloat16",
}
_HEAD_TYPES = ("shga", "mha", "mqa")
_ATTN_TYPES = ("vq", "full")
REDUCTIONS = ("scan", "serial", "matmul", "assoc_scan", "auto")
_REMATS = ("none", "block", "dots", "layer", "auto")
_OPTIMIZERS = ("adamw", "lion", "adafactor")
_LR_SCHEDULES = ("cosine", "linear", "inv_sqrt")


def _require(config: Any, condition: bool, names: str, rule: str) -> None:
  """Raises a ValueError that prints the fields `names` when `condition` fails."""
  if not condition:
    values = ", ".join(f"{n}={getattr(config, n)!r}" for n in names.split())
    raise ValueError(f"{type(config).__name__}: {values}: {rule}.")


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_types(config: Any) -> None:
  """Holds every field against its annotation; ints are welcome as floats."""
  for name, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, name)
    if type(None) in typing.get_args(hint):
      if value is None:
        continue
      hint = typing.get_args(hint)[0]
    if hint is float:
      _require(config, _is_number(value), name, "must be a number")
    elif hint is int:
      _require(config, _is_number(value) and isinstance(value, int), name, "must be an integer")
    else:
      _require(config, isinstance(value, hint), name, f"must be a {hint.__name__}")


class _JsonMixin:
  """What both configurations share: copying with changes, and JSON."""

  def replace(self, **changes: Any) -> Self:
    """A copy with some fields changed, validated again."""
    return type(self)(**{**dataclasses.asdict(self), **changes})

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

  @classmethod
  def from_json(cls, text: str) -> Self:
    """The inverse of `to_json`; unknown names are an error."""
    settings = json.loads(text)
    if not isinstance(settings, dict):
      raise ValueError(f"{cls.__name__}: expected a JSON object, got {type(settings).__name__}.")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(settings) - known)
    if unknown:
      raise ValueError(f"{cls.__name__}: unknown settings {unknown}; known are {sorted(known)}.")
    return cls(**settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(_JsonMixin):
  """The model. Every field but `n_vocab` has a default.

  >>> config = TransformerConfig(n_vocab=259, d_model=64, d_v=128)
  >>> config.replace(n_head=2).n_head
  2
  """

  n_vocab: int  # X
  d_model: int = 256  # D
  d_k: int = 64  # K, per head
  d_v: int = 512  # V, per head
  n_head: int = 1  # H
  n_kv_head: int | None = None  # G; None: as many as n_head, or 1 for mqa
  n_code: int = 256  # S
  n_layer: int = 2  # N; two attentions in each
  block_len: int = 256  # L
  mem_len: int = 256  # M
  head_type: str = "shga"  # gated, twice a layer; mha, mqa: ungated, and an MLP
  attn_type: str = "vq"  # full: plain keys, in quadratic time, and mem_len tokens of context
  reduction: str = "auto"  # how blocks get their caches: see vq_attention
  causal: bool = True  # False: an encoder, whose tokens attend both sides of their own call
  agg_cache: bool = True  # False: tokens farther than mem_len are not attended
  grad_thru_cache: bool = True  # False: gradients stop at the start of each block
  doc_mask: bool = True  # False: attention crosses documents, as in the paper
  pe_abs: bool = False
  pe_lam: float = 100_000.0
  p_dropemb: float = 0.0
  p_dropsin: float = 0.0
  p_dropres: float = 0.0
  p_droplyr: float = 0.0
  c_beta: float = 1e-4
  c_gamma: float = 0.99
  c_revive: float = 0.0  # codes used less than this per update, on average, become recent keys
  e_tie: bool = False
  e_preln: bool = False
  e_scale: float = 1.0
  precision: str = "float32"
  remat: str = "auto"  # what the backward pass computes again: see README

  def __post_init__(self):
    _check_types(self)
    sizes = [
      "n_vocab",
      "d_model",
      "d_k",
      "d_v",
      "n_head",
      "n_code",
      "n_layer",
      "block_len",
      "mem_len",
    ]
    if self.n_kv_head is not None:
      sizes.append("n_kv_head")
    for name in sizes:
      _require(self, getattr(self, name) >= 1, name, "must be at least 1")
    _require(
      self, self.d_model % 2 == 0, "d_model", "must be even (half of the sinusoids are cosines)"
    )
    _require(
      self, self.n_head % self.kv_heads == 0, "n_head n_kv_head", "n_kv_head must divide n_head"
    )
    for name in ("p_dropemb", "p_dropsin", "p_dropres", "p_droplyr"):
      _require(self, 0.0 <= getattr(self, name) < 1.0, name, "a dropout rate must lie in [0, 1)")
    _require(self, self.c_beta >= 0.0, "c_beta", "must not be negative")
    _require(self, 0.0 <= self.c_gamma < 1.0, "c_gamma", "must lie in [0, 1)")
    _require(
      self,
      0.0 <= self.c_revive < 1.0,
      "c_revive",
      "must lie in [0, 1): a revived code counts as used once",
    )
    _require(self, self.pe_lam > 0.0, "pe_lam", "must be positive")
    _require(self, self.e_scale > 0.0, "e_scale", "must be positive")
    for name, values in (
      ("head_type", _HEAD_TYPES),
      ("attn_type", _ATTN_TYPES),
      ("reduction", REDUCTIONS),
      ("remat", _REMATS),
    ):
      _require(self, getattr(self, name) in values, name, f"must be one of {values}")
    _require(
      self,
      self.head_type != "mqa" or self.kv_heads == 1,
      "head_type n_kv_head",
      "mqa has one key/value head",
    )
    try:
      policy = self.policy
      known = policy.param_dtype == jnp.float32 and {policy.compute_dtype, policy.output_dtype} <= {
        jnp.float32,
        jnp.bfloat16,
        jnp.float16,
      }
    except (KeyError, ValueError):
      known = False
    _require(
      self,
      known,
      "precision",
      "must be 'float32', 'bfloat16' or a jmp policy with float32 "
      "parameters, such as 'params=float32,compute=bfloat16,output=bfloat16'",
    )

  @property
  def kv_heads(self) -> int:
    """G, the number of key/value heads."""
    if self.n_kv_head is not None:
      return self.n_kv_head
    return 1 if self.head_type == "mqa" else self.n_head

  @property
  def gated(self) -> bool:
    """Whether a layer is two gated attentions; else it is one attention and an MLP."""
    return self.head_type == "shga"

  @property
  def mlp_width(self) -> int:
    """Of the hidden layer; the wider one of mqa makes up for its fewer keys and values."""
    return (5 if self.head_type == "mqa" else 4) * self.d_model

  @property
  def policy(self) -> jmp.Policy:
    """The mixed-precision policy that `precision` names."""
    return jmp.get_policy(_PRECISIONS.get(self.precision, self.precision))

  @property
  def compute_dtype(self) -> jnp.dtype:
    return jnp.dtype(self.policy.compute_dtype)

  @classmethod
  def tiny(cls, **changes: Any) -> Self:
    """A model that trains in seconds on a laptop, for tests and first steps."""
    return cls(
      **{
        **dict(
          n_vocab=259, d_model=32, d_k=16, d_v=64, n_code=16, n_layer=2, block_len=16, mem_len=16
        ),
        **changes,
      }
    )

  @classmethod
  def enwik8(cls, **changes: Any) -> Self:
    """The paper's byte-level text model: 187,679,750 parameters."""
    return cls(
      **{
        **dict(
          n_vocab=259,
          d_model=768,
          d_k=128,
          d_v=1536,
          n_code=512,
          n_layer=24,
          block_len=512,
          mem_len=512,
          p_dropsin=0.2,
          p_dropres=0.5,
          p_droplyr=0.3,
          precision="bfloat16",
        ),
        **changes,
      }
    )

  @classmethod
  def pg19(cls, **changes: Any) -> Self:
    """The paper's open-vocabulary book model: 1,314,659,584 parameters."""
    return cls(
      **{
        **dict(
          n_vocab=32_000,
          d_model=2048,
          d_k=128,
          d_v=4096,
          n_code=512,
          n_layer=24,
          block_len=512,
          mem_len=512,
          doc_mask=False,
          p_dropsin=0.1,
          p_dropres=0.1,
          p_droplyr=0.1,
          e_tie=True,
          e_preln=True,
          e_scale=0.005,
          precision="bfloat16",
        ),
        **changes,
      }
    )

  @classmethod
  def imagenet64(cls, **changes: Any) -> Self:
    """The paper's model of 64x64 images as 12,288 bytes: 1,249,622,276 parameters."""
    return cls(
      **{
        **dict(
          n_vocab=259,
          d_model=2048,
          d_k=128,
          d_v=4096,
          n_code=512,
          n_layer=24,
          block_len=512,
          mem_len=512,
          pe_abs=True,
          p_dropsin=0.1,
          e_tie=True,
          e_preln=True,
          e_scale=0.005,
          precision="bfloat16",
        ),
        **changes,
      }
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(_JsonMixin):
  """Optimizer, schedule and the shape of a batch.

  A step reads `[global_batch_size, sequence_len]` tokens and makes `sequence_len / update_len`
  updates; `n_warmup_step` and `n_max_step` count updates.

  >>> TrainConfig(sequence_len=512, update_len=128).updates_per_step
  4
  """

  optimizer: str = "adamw"
  lr_max: float = 4e-4
  lr_schedule: str = "cosine"
  n_warmup_step: int = 100
  n_max_step: int = 1000
  grad_clip: float | None = 0.1  # None: gradients are not clipped
  wd_lam: float = 0.0  # decoupled, and not multiplied by the learning rate
  sequence_len: int = 512
  update_len: int = 512
  global_batch_size: int = 8
  n_accumulate: int = 1  # parts of a batch whose gradients are computed in turn, in less memory

  def __post_init__(self):
    _check_types(self)
    _require(self, self.optimizer in _OPTIMIZERS, "optimizer", f"must be one of {_OPTIMIZERS}")
    _require(
      self, self.lr_schedule in _LR_SCHEDULES, "lr_schedule", f"must be one of {_LR_SCHEDULES}"
    )
    for name in ("lr_max", "wd_lam", "n_warmup_step"):
      _require(self, getattr(self, name) >= 0, name, "must not be negative")
    for name in ("n_max_step", "sequence_len", "update_len", "global_batch_size", "n_accumulate"):
      _require(self, getattr(self, name) >= 1, name, "must be at least 1")
    _require(
      self, self.grad_clip is None or self.grad_clip > 0, "grad_clip", "must be positive, or None"
    )
    _require(
      self,
      self.n_warmup_step < self.n_max_step,
      "n_warmup_step n_max_step",
      "the warm-up must end before the last update",
    )
    _require(
      self,
      self.sequence_len % self.update_len == 0,
      "sequence_len update_len",
      "update_len must divide sequence_len",
    )
    _require(
      self,
      self.global_batch_size % self.n_accumulate == 0,
      "global_batch_size n_accumulate",
      "n_accumulate must divide global_batch_size",
    )

  @property
  def updates_per_step(self) -> int:
    return self.sequence_len // self.update_len

  @classmethod
  def enwik8(cls, **changes: Any) -> Self:
    """The paper's training on bytes of text."""
    return cls(
      **{
        **dict(
          lr_max=4e-4,
          n_warmup_step=10_000,
          n_max_step=125_000,
          wd_lam=2e-4,
          sequence_len=8192,
          update_len=2048,
          global_batch_size=128,
        ),
        **changes,
      }
    )

  @classmethod
  def pg19(cls, **changes: Any) -> Self:
    """The paper's training on books."""
    return cls(
      **{
        **dict(
          optimizer="adafactor",
          lr_max=1e-2,
          lr_schedule="inv_sqrt",
          n_warmup_step=10_000,
          n_max_step=500_000,
          sequence_len=8192,
          update_len=2048,
          global_batch_size=128,
        ),
        **changes,
      }
    )

  @classmethod
  def imagenet64(cls, **changes: Any) -> Self:
    """The paper's training on images."""
    return cls(
      **{
        **dict(
          optimizer="adafactor",
          lr_max=1e-2,
          n_warmup_step=10_000,
          n_max_step=500_000,
          sequence_len=12_288,
          update_len=2048,
          global_batch_size=16,
        ),
        **changes,
      }
    )
