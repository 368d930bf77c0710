"""Builds kloss. Everything static is in pyproject.toml; csrc/ gets its extension here once it holds sources."""

from setuptools import setup

setup()
