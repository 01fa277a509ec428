"""Scores of predictions, in numpy and float64: of each image, then averaged, or from one confusion matrix for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np


def average_over_images(scores: Iterable[Mapping[str, float]]) -> tuple[dict[str, float], int]:
    """Return the mean of every score over the images, and how many images were left out.

    Every image counts the same, however many valid pixels it has. One without any has no scores and is left out
    (Probe3D counts it with scores of 0); if all are, the mean has no scores either. A score that is not a number is
    never left out: the mean is none then.

    Args:
        scores: of each image, as `depth_scores` and `normal_scores` return them; empty for one without valid pixels.
    """
    scores = list(scores)
    kept = [image for image in scores if image]
    names = kept[0] if kept else ()
    means = {name: float(np.mean([image[name] for image in kept], dtype=np.float64)) for name in names}
    return means, len(scores) - len(kept)
