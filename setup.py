"""Build entry point. Metadata lives in pyproject.toml; native extensions will be listed here."""

from setuptools import setup

setup()
