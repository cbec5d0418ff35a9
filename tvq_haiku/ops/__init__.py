"""Array functions that know nothing of attention or of the model."""
