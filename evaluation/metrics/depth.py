"""Errors of a predicted depth, absolute and up to scale and shift, as Probe3D measures them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

LEAST = 1e-9  # metres; replaces depths that are not positive in a ratio
RATIO = 1.25


def depth_scores(
    prediction: Float[ndarray, "H W"], target: Float[ndarray, "H W"], valid: Bool[ndarray, "H W"], aligned: bool
) -> dict[str, float]:
    """Return the scores of one image; an empty dictionary if it has no valid pixel.

    They are `rmse`, the root of the mean squared error in metres, and `d1`, `d2`, `d3`, the share of valid pixels at
    which the larger of prediction / target and target / prediction is below 1.25, 1.25^2 and 1.25^3.

    Args:
        prediction, target: depth in metres; the target is positive where valid.
        valid: pixels that count; in the protocol those with 0 < target <= 10, without a border cut off.
        aligned: compare up to scale and shift, see `align`. The aligned depth is not clipped: a pixel where it is not
            positive counts for none of d1, d2 and d3.
    """
    prediction, target = (depth[valid].astype(np.float64) for depth in (prediction, target))
    if not len(target):
        return {}
    if aligned:
        prediction = align(prediction, target)
    ratio = np.maximum(prediction / np.maximum(target, LEAST), target / np.maximum(prediction, LEAST))
    shares = {f"d{k}": float(np.mean(ratio < RATIO**k)) for k in (1, 2, 3)}
    return {"rmse": float(np.sqrt(np.mean(np.square(prediction - target)))), **shares}


def align(prediction: Float[ndarray, " N"], target: Float[ndarray, " N"]) -> Float[ndarray, " N"]:
    """Return scale * prediction + shift with the least squared error.

    A constant prediction, for which they are not unique, stays as it is (Probe3D's `match_scale_and_shift`).
    """
    if np.ptp(prediction) == 0:
        return prediction
    centred = prediction - prediction.mean()
    scale = np.sum(centred * target) / np.sum(np.square(centred))
    return scale * centred + target.mean()
