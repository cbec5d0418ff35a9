"""One training update: losses, gradients, optimizers."""
