"""Photographs in, batches out."""
