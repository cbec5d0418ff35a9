"""Transformer-VQ in Haiku: softmax attention over quantized keys, in linear time."""

from tvq_haiku.attention import reference
from tvq_haiku.attention.state import AttentionState, initial_attention_state
from tvq_haiku.attention.vq import AttentionOutput, vq_attention
from tvq_haiku.checkpoint import official as interop
from tvq_haiku.checkpoint.checkpoint_writer import save_checkpoint
from tvq_haiku.checkpoint.checkpoints import Checkpoint, CheckpointError, load_checkpoint
from tvq_haiku.checkpoint.export import export_params, import_params
from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data.image_grid import image_grid, images_from_tokens
from tvq_haiku.evaluation.compression import CompressionError, compress, decompress
from tvq_haiku.evaluation.likelihood import EvalSums, Likelihood, evaluate, make_eval_step
from tvq_haiku.evaluation.scoring import Scores, score
from tvq_haiku.generation.conversation import Conversation
from tvq_haiku.generation.decode_step import decode_step
from tvq_haiku.generation.decoder import DecodeState, finish_decoding, start_decoding
from tvq_haiku.generation.decoder_weights import DecoderWeights, prepare_weights
from tvq_haiku.generation.generate import GenerateOutput, continue_text, generate
from tvq_haiku.generation.saved_state import SavedState, load_state, save_state
from tvq_haiku.language_model import LanguageModel, load
from tvq_haiku.model.parameters import params_shapes
from tvq_haiku.model.transformer import (
  Transformer,
  TransformerOutput,
  TransformerState,
  initial_state,
  make_transformer,
)
from tvq_haiku.training.losses import LossAux, training_loss
from tvq_haiku.training.nan_debug import NumericalError
from tvq_haiku.training.train_step import TrainState, init_train_state, make_train_step

__version__ = "0.1.0"  # a literal, which the build reads without importing the package
