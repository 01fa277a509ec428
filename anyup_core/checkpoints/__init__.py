"""Checkpoints in every format, as numpy arrays: key tables, readers and writers, names and fetching."""
