"""Checkpoints of training runs, exported parameters, and conversion to the paper's code."""
