"""Photographs in, batches out: where they are kept (sources), how they are read (images), in what order (pipeline)."""

from train.data.pipeline import ARRAYS, Batches
from train.data.sources import open_source

__all__ = ["ARRAYS", "Batches", "open_source"]
