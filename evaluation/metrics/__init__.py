"""Scores of predictions, in numpy and float64: means over images, or from one confusion matrix for all images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np


def average_over_images(scores: Iterable[Mapping[str, float]]) -> tuple[dict[str, float], int]:
    """Return the mean of every score over the images, and the number of images without scores, which are left out.

    Every image with valid pixels counts the same, however many it has (Probe3D counts an image without any with scores
    of 0). Without any such image there are no means. A score of nan makes the mean nan.

    Args:
        scores: of each image, as `depth_scores` and `normal_scores` return them; empty for one without valid pixels.
    """
    scores = list(scores)
    kept = [image for image in scores if image]
    names = kept[0] if kept else ()
    means = {name: float(np.mean([image[name] for image in kept], dtype=np.float64)) for name in names}
    return means, len(scores) - len(kept)
