"""Trains deep learning recommendation models whose embedding tables are sharded over many devices."""

from importlib import metadata as _metadata

__version__ = _metadata.version("papilio")
