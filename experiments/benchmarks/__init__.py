"""Measurements of the library, each a command that prints a table."""
