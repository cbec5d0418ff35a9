"""Likelihood, compression and cost of a model."""
