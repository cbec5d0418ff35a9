"""Frozen, validated configurations of the model and (from `train_config`) of its training.

Fields have the names that the paper's code uses, so that its settings can be copied. Every field
has a help text (`field_help`), from which the class docstrings and the flags of the launchers are
made. A capital letter in a help text, such as D, denotes this size in array shapes throughout the
package.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import jmp

from tvq_haiku.train_config import TrainConfig as TrainConfig
from tvq_haiku.utils.settings import REQUIRED, Settings, document_fields, setting
from tvq_haiku.utils.settings import field_help as field_help

HEAD_TYPES = ("shga", "mha", "mqa")
ATTN_TYPES = ("vq", "full", "window")
REDUCTIONS = ("scan", "serial", "matmul", "assoc_scan", "auto")
REMATS = ("none", "block", "dots", "layer", "auto")

_PRECISIONS = {
  "float32": "params=float32,compute=float32,output=float32",
  "bfloat16": "params=float32,compute=bfloat16,output=bfloat16",
}

# The settings that the paper's three models have in common. All presets have the settings of the
# launch scripts of the paper's code. Its later branch, `optimized`, has batches of 32 (enwik8), 32
# (PG-19) and 16 (ImageNet64), and makes one update per sequence.
_PAPER = dict(d_k=128, n_code=512, n_layer=24, block_len=512, mem_len=512, precision="bfloat16")


@document_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(Settings):
  """Architecture, numerics and losses of the model. Only `n_vocab` has no default.

  >>> config = TransformerConfig(n_vocab=259, d_model=64, d_v=128)
  >>> config.replace(n_head=2).n_head
  2
  """

  # Sizes.
  n_vocab: int = setting(REQUIRED, "Vocabulary size X; token ids are in [0, n_vocab).")
  d_model: int = setting(256, "Model width D; must be even.")
  d_k: int = setting(64, "Width K of the queries and keys of one head.")
  d_v: int = setting(512, "Width V of the values of one head.")
  n_head: int = setting(1, "Number of query heads H per attention.")
  n_kv_head: int | None = setting(
    None, "Number of key/value heads G; must divide n_head. None: 1 for 'mqa', else n_head."
  )
  n_code: int = setting(
    256, "Number of codes S per codebook; every key/value head has one codebook."
  )
  n_layer: int = setting(2, "Number of layers N, each with two residual branches: see head_type.")
  block_len: int = setting(
    256,
    "Block length L in tokens: the queries of a block share one window and one cache. It changes "
    "speed, memory and the gradients of keys, but not the logits.",
  )
  mem_len: int = setting(
    256,
    "Memory length M in tokens: each block attends individually to the M tokens before it; older "
    "tokens are compressed into the cache. With attn_type='window': the length of the context.",
  )
  full_len: int | None = setting(
    None, "Length in tokens of the context of attn_type='full'. None: mem_len."
  )

  # Attention.
  head_type: str = setting(
    "shga",
    "Branches of a layer. 'shga': two gated attentions. 'mha': an ungated attention and an MLP. "
    "'mqa': like 'mha', with one key/value head.",
  )
  attn_type: str | tuple[str, str] = setting(
    "vq",
    "'vq': quantized keys, linear time. 'full': plain keys of the last full_len tokens, quadratic "
    "time, no cache. 'window': plain keys of the last mem_len tokens, no cache. A pair (as a flag: "
    "vq,full) gives the types of a layer's two attentions; only with head_type='shga'.",
  )
  reduction: str = setting(
    "auto",
    "How the caches of all blocks are computed: 'scan' (block by block, least memory), 'serial', "
    "'matmul' or 'assoc_scan' (all blocks at once); 'auto' chooses by the device and the number of "
    "blocks. Results agree up to rounding.",
  )
  causal: bool = setting(
    True, "True: tokens attend to earlier tokens. False: a bidirectional encoder without state."
  )
  agg_cache: bool = setting(
    True, "True: queries attend to the cache. False: tokens farther than mem_len are masked."
  )
  grad_thru_cache: bool = setting(
    True, "True: gradients flow to the values of earlier blocks. False: they stop at each block."
  )
  doc_mask: bool = setting(
    True,
    "True: tokens attend only to their own document, and absolute positions start at 0 in "
    "each document. False: attention crosses document boundaries, as in the paper.",
  )

  # Inputs and positions.
  no_emb: bool = setting(
    False,
    "True: the inputs are features [B, T, D] instead of tokens, and there are no token embeddings, "
    "except those of a tied output projection (e_tie). False: the inputs are tokens.",
  )
  pe_abs: bool = setting(False, "Whether to add absolute sinusoidal positions to the embeddings.")
  pe_lam: float = setting(
    100_000.0, "Base of the sinusoids: their wavelengths are 2*pi*pe_lam^(2i/d_model) tokens."
  )

  # Dropout; all rates are in [0, 1).
  p_dropemb: float = setting(0.0, "Dropout rate of the embeddings, per element.")
  p_dropsin: float = setting(
    0.0, "Dropout rate of the relative-position sinusoids, per element; one mask per sequence."
  )
  p_dropres: float = setting(0.0, "Dropout rate of the output of each branch, per element.")
  p_droplyr: float = setting(
    0.0, "LayerDrop rate: probability that a sequence skips a branch; one mask per sequence."
  )

  # Codebook.
  c_beta: float = setting(1e-4, "Weight of the commitment loss.")
  c_gamma: float = setting(
    0.99, "Decay per update of the codebook's exponential moving averages, in [0, 1)."
  )
  c_revive: float = setting(
    0.0,
    "Threshold in [0, 1): codes whose average number of keys per update is lower are replaced by "
    "random keys of the batch. 0: no code is replaced, as in the paper.",
  )

  # Logits.
  e_tie: bool = setting(False, "Whether the output projection shares the embedding matrix.")
  e_preln: bool = setting(False, "Whether to apply RMSNorm before the output projection.")
  e_scale: float = setting(1.0, "Factor that multiplies the logits.")

  # Numerics.
  precision: str = setting(
    "float32",
    "Dtype of activations: 'float32', 'bfloat16', or a jmp policy with float32 parameters such as "
    "'params=float32,compute=bfloat16,output=float32'. Parameters are always float32.",
  )
  remat: str = setting(
    "auto",
    "Activations that the backward pass recomputes instead of keeping. 'none': nothing. "
    "'block': attention scores. 'dots': everything but matrix products without a batch axis, such "
    "as projections. 'layer': everything inside a layer. 'auto': 'none' if the activations fit "
    "into device memory, else 'layer'.",
  )

  def __post_init__(self):
    if isinstance(self.attn_type, list):  # JSON has no tuples
      object.__setattr__(self, "attn_type", tuple(self.attn_type))
    self._check_types()
    self._check_minimum(
      1, "n_vocab d_model d_k d_v n_head n_kv_head n_code n_layer block_len mem_len full_len"
    )
    self._check_choice("head_type", HEAD_TYPES)
    self._check_attn_type()
    self._check_choice("reduction", REDUCTIONS)
    self._check_choice("remat", REMATS)
    self._require(
      self.d_model % 2 == 0, "d_model", "must be even, because half of the sinusoids are cosines"
    )
    self._require(
      self.n_head % self.kv_heads == 0, "n_head n_kv_head", "n_kv_head must divide n_head"
    )
    self._require(
      self.head_type != "mqa" or self.kv_heads == 1,
      "head_type n_kv_head",
      "n_kv_head must be 1 or None for 'mqa'",
    )
    for name in ("p_dropemb", "p_dropsin", "p_dropres", "p_droplyr"):
      self._require(0.0 <= getattr(self, name) < 1.0, name, "a dropout rate must be in [0, 1)")
    self._check_minimum(0, "c_beta")
    self._require(0.0 <= self.c_gamma < 1.0, "c_gamma", "must be in [0, 1)")
    self._require(
      0.0 <= self.c_revive < 1.0,
      "c_revive",
      "must be in [0, 1), because the count of a revived code is set to 1",
    )
    for name in ("pe_lam", "e_scale"):
      self._require(getattr(self, name) > 0.0, name, "must be positive")
    self._check_precision()

  def _check_attn_type(self) -> None:
    """Raises a ValueError unless `attn_type` is valid; replaces a pair of equal types by one."""
    is_pair = isinstance(self.attn_type, tuple)
    types = self.attn_type if is_pair else (self.attn_type,)
    self._require(
      len(types) == (2 if is_pair else 1) and all(name in ATTN_TYPES for name in types),
      "attn_type",
      f"must be one of {ATTN_TYPES}, or a pair of these",
    )
    self._require(
      self.gated or not is_pair,
      "attn_type head_type",
      "a pair needs head_type='shga', because the layers of other types have one attention",
    )
    self._require(
      self.causal or "window" not in types,
      "attn_type causal",
      "'window' needs causal=True, because it attends to earlier tokens",
    )
    if len(set(types)) == 1:
      object.__setattr__(self, "attn_type", types[0])

  def _check_precision(self) -> None:
    """Raises a ValueError unless `precision` names a policy that trains without loss scaling."""
    try:
      policy = self.policy
      parameters, activations = policy.param_dtype, {policy.compute_dtype, policy.output_dtype}
    except (KeyError, ValueError):
      parameters, activations = None, set()
    self._require(
      jnp.float16 not in activations,
      "precision",
      "float16 would need loss scaling, which is not implemented; use 'bfloat16' or 'float32'",
    )
    self._require(
      parameters == jnp.float32 and activations <= {jnp.float32, jnp.bfloat16},
      "precision",
      "must be 'float32', 'bfloat16' or a jmp policy with float32 parameters, such as "
      "'params=float32,compute=bfloat16,output=float32'",
    )

  @property
  def kv_heads(self) -> int:
    """G, the number of key/value heads."""
    if self.n_kv_head is not None:
      return self.n_kv_head
    return 1 if self.head_type == "mqa" else self.n_head

  @property
  def gated(self) -> bool:
    """True if a layer is two gated attentions; False if it is one attention and an MLP."""
    return self.head_type == "shga"

  @property
  def attention_configs(self) -> tuple[Self, ...]:
    """One configuration for each attention of a layer, which describes this attention alone.

    Its `attn_type` is 'vq' or 'full', and its `mem_len` is the length of the memory or the context:
    'window' is the same as 'full' with a context of mem_len tokens.

    >>> config = TransformerConfig(n_vocab=259, attn_type=("vq", "full"), full_len=2048)
    >>> [(c.attn_type, c.mem_len) for c in config.attention_configs]
    [('vq', 256), ('full', 2048)]
    """
    types = self.attn_type if isinstance(self.attn_type, tuple) else (self.attn_type,) * 2
    full_len = self.mem_len if self.full_len is None else self.full_len
    settings = {
      "vq": dict(attn_type="vq"),
      "full": dict(attn_type="full", mem_len=full_len),
      "window": dict(attn_type="full"),
    }
    n_attention = 2 if self.gated else 1
    return tuple(self.replace(full_len=None, **settings[name]) for name in types[:n_attention])

  @property
  def mlp_width(self) -> int:
    """MLP hidden width: 4·D, or 5·D for MQA, which has fewer key/value parameters."""
    return (5 if self.head_type == "mqa" else 4) * self.d_model

  @property
  def policy(self) -> jmp.Policy:
    """The mixed-precision policy that `precision` names.

    | arrays                                                          | dtype           |
    |-----------------------------------------------------------------|-----------------|
    | parameters, gradients, optimizer state (Lion: bfloat16 moments) | float32         |
    | code counts, codebook sums, distances of keys to codes          | float32         |
    | attention scores, softmax statistics                            | float32         |
    | cache means and their accumulation                              | float32         |
    | statistics of norms, logits, losses                             | float32         |
    | q, k, v and all other inputs of the large matrix products       | `compute_dtype` |
    | outputs of projections, residual stream                         | `output_dtype`  |

    Counts and moving averages would stop changing in bfloat16, where 256 + 1 = 256.
    """
    return jmp.get_policy(_PRECISIONS.get(self.precision, self.precision))

  @property
  def compute_dtype(self) -> jnp.dtype:
    """Dtype of the inputs of matrix products."""
    return jnp.dtype(self.policy.compute_dtype)

  @classmethod
  def tiny(cls, **changes: Any) -> Self:
    """Returns a configuration that trains in seconds on a laptop, for tests and first steps."""
    settings = dict(
      n_vocab=259, d_model=32, d_k=16, d_v=64, n_code=16, n_layer=2, block_len=16, mem_len=16
    )
    return cls(**(settings | changes))

  @classmethod
  def enwik8(cls, **changes: Any) -> Self:
    """Returns the configuration of the paper's byte-level text model: 187,679,750 parameters."""
    settings = dict(n_vocab=259, d_model=768, d_v=1536, p_dropsin=0.2, p_dropres=0.5, p_droplyr=0.3)
    return cls(**(_PAPER | settings | changes))

  @classmethod
  def pg19(cls, **changes: Any) -> Self:
    """Returns the configuration of the paper's model of PG-19: 1,314,659,584 parameters."""
    sizes = dict(n_vocab=32_000, d_model=2048, d_v=4096, doc_mask=False)
    dropout = dict(p_dropsin=0.1, p_dropres=0.1, p_droplyr=0.1)
    logits = dict(e_tie=True, e_preln=True, e_scale=0.005)
    return cls(**(_PAPER | sizes | dropout | logits | changes))

  @classmethod
  def imagenet64(cls, **changes: Any) -> Self:
    """Returns the configuration of the paper's image model: 1,249,622,276 parameters.

    A sequence is an image of 64 x 64 pixels, as 12,288 bytes.
    """
    sizes = dict(n_vocab=259, d_model=2048, d_v=4096, pe_abs=True, p_dropsin=0.1)
    logits = dict(e_tie=True, e_preln=True, e_scale=0.005)
    return cls(**(_PAPER | sizes | logits | changes))
