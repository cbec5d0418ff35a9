"""Training states and parameters on disk."""
