"""The commands of this repository: each is started by `python -m experiments.NAME`."""
