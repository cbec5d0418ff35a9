"""All settings are in setup.cfg."""

import setuptools

setuptools.setup()
