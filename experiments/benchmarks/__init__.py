"""Benchmarks of the library; each is a command that prints a table."""
