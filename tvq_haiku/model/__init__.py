"""Haiku modules: the parts of the model that have parameters."""
