"""Array functions that do not depend on attention or on the model."""
