"""Transformer-VQ in Haiku: softmax attention over quantized keys, in linear time."""

from tvq_haiku.block_attention import AttentionState
from tvq_haiku.block_attention import initial_attention_state
from tvq_haiku.block_attention import vq_attention
from tvq_haiku.config import TrainConfig
from tvq_haiku.config import TransformerConfig
from tvq_haiku.transformer import initial_state
from tvq_haiku.transformer import make_transformer
from tvq_haiku.transformer import Transformer
from tvq_haiku.transformer import TransformerOutput
from tvq_haiku.transformer import TransformerState
