"""Errors of predicted surface normals, as Probe3D measures them (after Fouhey et al., 2013)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

THRESHOLDS = "11.25", "22.5", "30"  # degrees


def normal_scores(
    prediction: Float[ndarray, "H W 3"], target: Float[ndarray, "H W 3"], valid: Bool[ndarray, "H W"]
) -> dict[str, float]:
    """Return the scores of one image; an empty dictionary if it has no valid pixel.

    They are `rmse`, the root of the mean squared angle between prediction and target in degrees, and `11.25`, `22.5`,
    `30`, the share of valid pixels whose angle is below this number of degrees.

    Args:
        prediction, target: of any length.
        valid: pixels that count.
    """
    angle = angles(*(normals[valid].astype(np.float64) for normals in (prediction, target)))
    if not len(angle):
        return {}
    shares = {threshold: float(np.mean(angle < float(threshold))) for threshold in THRESHOLDS}
    return {"rmse": float(np.sqrt(np.mean(np.square(angle)))), **shares}


def angles(left: Float[ndarray, "N 3"], right: Float[ndarray, "N 3"]) -> Float[ndarray, " N"]:
    """Return the angle between vectors in degrees, from 0 to 180; 90 if one of them is zero.

    Computed from sine and cosine, since an arc cosine loses all digits at small angles.
    """
    sine, cosine = np.linalg.norm(np.cross(left, right), axis=-1), (left * right).sum(-1)
    zero = ~(left.any(-1) & right.any(-1))
    return np.where(zero, 90.0, np.degrees(np.arctan2(sine, cosine)))
