"""From photographs to batches: where they come from (sources), how one is read (images), and their order (pipeline)."""

from train.data.pipeline import ARRAYS, Batches
from train.data.sources import open_source

__all__ = ["ARRAYS", "Batches", "open_source"]
