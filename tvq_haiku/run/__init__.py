"""A training run from data to test metrics, and the files it writes."""
