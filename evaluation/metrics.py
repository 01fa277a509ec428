"""Scores of predictions, in numpy and float64: means over images, or from one confusion matrix for all images.

Depth is compared as it is, and up to scale and shift; normals by their angles, both as Probe3D does (after Fouhey et
al., 2013). Segmentations have pixel accuracy and intersection over union, also for pixels near the borders of objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy import ndarray

from anyup_core.settings import require

LEAST = 1e-9  # metres; replaces depths that are not positive in a ratio
RATIO = 1.25
THRESHOLDS = "11.25", "22.5", "30"  # degrees


def average_over_images(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every score over the images with valid pixels; empty if there are none.

    Every such image counts the same, however many valid pixels it has (Probe3D counts an image without any with scores
    of 0). A score of nan makes the mean nan.

    Args:
        scores: of each image, as `depth_scores` and `normal_scores` return them; empty for one without valid pixels.
    """
    kept = [image for image in scores if image]
    return {name: float(np.mean([image[name] for image in kept], dtype=np.float64)) for name in (kept or [{}])[0]}


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


class Confusion:
    """Counts, over a whole data set, of which class was predicted where another was the truth.

    Args:
        classes: number K of classes.
        ignore: label of pixels that do not count. If it is one of the classes, that class is not scored either.

    Attributes:
        counts: (K, K) int64, row the label, column the prediction. Those of parts of a data set may be added.

    Raises:
        ValueError: for fewer than one class.
    """

    def __init__(self, classes: int, ignore: int = 255):
        require(classes >= 1, "classes", classes, "give at least 1")
        self.classes, self.ignore = classes, ignore
        self.counts: Integer[ndarray, "K K"] = np.zeros((classes, classes), np.int64)

    def add(
        self,
        prediction: Integer[ndarray, "..."],
        label: Integer[ndarray, "..."],
        where: Bool[ndarray, "..."] | None = None,
    ) -> None:
        """Count the pixels of one image or of several.

        Args:
            prediction, label: classes from 0 on, in arrays of one shape; the label may be `ignore`.
            where: count only these pixels; None for all.

        Raises:
            ValueError: if the shapes differ, or the value of a counted pixel is no class. Nothing is counted then.
        """
        if prediction.shape != label.shape or (where is not None and where.shape != label.shape):
            raise ValueError(f"Prediction {prediction.shape}, label {label.shape} and `where` must have one shape.")
        kept = label != self.ignore if where is None else where & (label != self.ignore)
        prediction, label = prediction[kept].astype(np.int64), label[kept].astype(np.int64)
        for name, values in ("prediction", prediction), ("label", label):
            wrong = values[(values < 0) | (values >= self.classes)]
            if len(wrong):
                raise ValueError(
                    f"A {name} is {wrong[0]}, but there are {self.classes} classes, from 0 to {self.classes - 1}, "
                    f"and ignore={self.ignore}."
                )
        pairs = np.bincount(label * self.classes + prediction, minlength=self.classes**2)
        self.counts += pairs.reshape(self.counts.shape)

    def pixel_accuracy(self) -> float:
        """Return the share of pixels that were predicted right; nan if no pixel was counted."""
        total = self.counts.sum()
        return float(self.counts.trace() / total) if total else float("nan")

    def iou(self) -> Float[ndarray, " K"]:
        """Return TP / (TP + FP + FN) of each class; nan for one that neither occurs nor was predicted."""
        right = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - right
        iou = np.full(self.classes, np.nan)
        np.divide(right, union, out=iou, where=union > 0)
        if 0 <= self.ignore < self.classes:
            iou[self.ignore] = np.nan
        return iou

    def mean_iou(self) -> float:
        """Return the mean over the classes whose IoU is a number; nan if there is none."""
        iou = self.iou()
        iou = iou[~np.isnan(iou)]
        return float(iou.mean()) if len(iou) else float("nan")


def boundary_band(label: Integer[ndarray, "H W"], width: int = 4) -> Bool[ndarray, "H W"]:
    """Return the pixels that have a pixel of another label at most `width` rows and at most `width` columns away.

    The label that is ignored counts as a label like any other.

    Raises:
        ValueError: for a negative width.
    """
    require(width >= 0, "width", width, "give 0 or more")
    from scipy import ndimage  # takes a quarter of a second

    side = 2 * width + 1
    least, greatest = (f(label, side, mode="nearest") for f in (ndimage.minimum_filter, ndimage.maximum_filter))
    return least != greatest
