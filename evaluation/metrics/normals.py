"""How far predicted surface normals are from the truth, as Probe3D measures it (after Fouhey et al., 2013)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

THRESHOLDS = "11.25", "22.5", "30"  # degrees


def normal_scores(
    prediction: Float[ndarray, "H W 3"], target: Float[ndarray, "H W 3"], valid: Bool[ndarray, "H W"]
) -> dict[str, float]:
    """Return the scores of one image; none, an empty dictionary, if it has no valid pixel.

    They are `rmse`, the root of the mean squared angle between prediction and target in degrees, and `11.25`, `22.5`,
    `30`, the share of valid pixels at which the angle is below as many degrees.

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

    From sine and cosine, as an arc cosine has no digits left where the angle is small.
    """
    sine, cosine = np.linalg.norm(np.cross(left, right), axis=-1), (left * right).sum(-1)
    zero = ~(left.any(-1) & right.any(-1))
    return np.where(zero, 90.0, np.degrees(np.arctan2(sine, cosine)))
