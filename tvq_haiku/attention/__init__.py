"""The algorithm of the paper, as pure functions of arrays."""
