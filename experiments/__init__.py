"""Launchers: flags in, results out; the library does the work."""
