"""Argument checks, files, progress bars and optional dependencies; independent of the model."""
