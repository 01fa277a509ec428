"""The means and deviations that images are normalised with."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

Preprocessing = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per RGB channel of an image in [0, 1]."""

IMAGENET: Preprocessing = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Preprocessing = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP: Preprocessing = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def normalize(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
    """Return an 8-bit image as guidance: scaled to [0, 1], ImageNet's mean and standard deviation applied."""
    mean, std = (np.array(value, np.float32) for value in IMAGENET)
    return (image / np.float32(255) - mean) / std
