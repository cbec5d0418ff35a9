"""Evaluation of a trained model: likelihood, lossless compression, and cost in FLOPs and memory."""
