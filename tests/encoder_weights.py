"""Seeded weights of encoders, in timm's layout, built from the key tables."""

from __future__ import annotations

import numpy as np

from anyup_core.encoders import catalogue

CLASSES = 10


def random_state(name: str, *, seed: int = 0, optional: bool = True) -> dict[str, np.ndarray]:
    """Return a state dict of an encoder; `optional=False` leaves its optional tensors out, such as the classifier's."""
    random = np.random.default_rng(seed)
    tensors = {}
    for row in catalogue.find(name).config.rows():
        if row.optional and not optional:
            continue
        for key in row.keys:
            shape = tuple(size or CLASSES for size in row.shape)
            if row.integer:
                tensors[key] = random.integers(1, 100, shape)
            elif len(shape) < 2:  # scales, shifts and variances
                tensors[key] = random.uniform(0.5, 1.5, shape).astype(np.float32)
            else:
                deviation = np.prod(shape[1:]) ** -0.5
                tensors[key] = (deviation * random.standard_normal(shape)).astype(np.float32)
    return tensors
