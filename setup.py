"""Lets pip install the package; all settings are in setup.cfg."""

import setuptools

setuptools.setup()
