"""Build entry point; all metadata lives in pyproject.toml.

The optional native ops (csrc/) are built from here once they exist. Installing the package never needs a compiler:
without native ops, the PyTorch reference implementation in src/msa_hf runs.
"""

from setuptools import setup

setup()
