"""Argument checks, files, progress and optional dependencies; knows nothing of the model."""
