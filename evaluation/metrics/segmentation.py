"""Pixel accuracy and intersection over union from one confusion matrix, and the pixels near the borders of objects."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Integer
from numpy import ndarray


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
        if classes < 1:
            raise ValueError(f"classes={classes} cannot be: give at least 1.")
        self.classes, self.ignore = classes, ignore
        self.counts: Integer[ndarray, "K K"] = np.zeros((classes, classes), np.int64)

    def add(
        self,
        prediction: Integer[ndarray, ...],
        label: Integer[ndarray, ...],
        where: Bool[ndarray, ...] | None = None,
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
    if width < 0:
        raise ValueError(f"width={width} cannot be: give 0 or more.")
    from scipy import ndimage  # takes a quarter of a second

    side = 2 * width + 1
    least, greatest = (f(label, side, mode="nearest") for f in (ndimage.minimum_filter, ndimage.maximum_filter))
    return least != greatest
