"""The linear probe for segmentation: one 1 x 1 convolution on frozen upsampled features.

The protocol is that of JAFAR (Couairon et al., 2025) with AnyUp's correction of the schedule. Since every method is
linear in what it upsamples, the head is applied at low resolution and its logits are upsampled: the same numbers for a
fraction of the memory and time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from evaluate.ahead import ahead
from evaluate.config import Config
from evaluate.fitting import Told, epoch_order, fit
from evaluate.frozen import Split, Views
from evaluate.metrics.segmentation import Confusion, boundary_band

BAND = 4  # pixels on either side of a label's edge

Head = dict[str, Float[Array, "..."]]


def init_head(channels: int, classes: int, seed: int) -> Head:
    """Return weight (C, K) and bias (K,) as PyTorch initialises a 1 x 1 convolution: uniform up to 1 / sqrt(C)."""
    bound = channels**-0.5
    keys = jax.random.split(jax.random.key(seed))
    draw = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
    return dict(weight=draw(keys[0], (channels, classes)), bias=draw(keys[1], (classes,)))


def cross_entropy(logits: Float[Array, "... K"], labels: UInt8[Array, ...], ignore: int) -> Float[Array, ""]:
    """Return the mean over all pixels whose label is not `ignore`; 0 if there are none."""
    valid = labels != ignore
    picked = jnp.where(valid, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, picked)
    return jnp.where(valid, losses, 0).sum() / jnp.maximum(valid.sum(), 1)


def train(
    views: Views, split: Split, channels: int, config: Config, saved: Path, about: Mapping[str, Any], say: Told
) -> Head:
    """Train the probe and return it.

    Args:
        views: of the training split.
        split: the training split.
        channels: of the features.
        config: the evaluation.
        saved, about, say: as for `fitting.fit`.

    Raises:
        ValueError: if `saved` is of a probe that something else was said of.
    """
    probe, ignore = config.probe, split.examples.ignore

    def loss(head, batch):
        data, labels = batch
        return cross_entropy(views.logits(data, head["weight"]) + head["bias"], labels, ignore)

    head = init_head(channels, len(split.examples.classes), config.seed)
    order = functools.partial(epoch_order, len(split), probe, config.seed)
    return fit(head, loss, lambda batch: views.batch(*batch), order, probe, len(split), saved, about, say)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a probe on the validation split, each from 0 to 1.

    Attributes:
        mean_iou, band_iou: mean over the classes that occur, of all pixels and of those within 4 pixels of an edge.
        accuracy: share of the pixels that are right.
        classes, band_classes: intersection over union of each class; None for one that does not occur.
    """

    mean_iou: float
    band_iou: float
    accuracy: float
    classes: tuple[float | None, ...]
    band_classes: tuple[float | None, ...]

    @classmethod
    def of(cls, whole: Confusion, band: Confusion) -> Scores:
        """Return the scores of what was counted."""
        rows = (tuple(None if np.isnan(x) else float(x) for x in counted.iou()) for counted in (whole, band))
        return cls(whole.mean_iou(), band.mean_iou(), whole.pixel_accuracy(), *rows)


def score(
    views: Views, split: Split, heads: Mapping[str, Head], shown: Sequence[int] = ()
) -> tuple[dict[str, Scores], dict[str, UInt8[np.ndarray, "N H W"]]]:
    """Score several heads on a whole split, which is gone through once; every pixel counts the same.

    Args:
        views: of the split.
        split: the images.
        heads: a name for each head.
        shown: the images whose predictions are wanted too, in rising order.

    Returns:
        The scores, and the classes predicted of the images to be shown, of each head.
    """
    classes, ignore = len(split.examples.classes), split.examples.ignore
    weight = jnp.concatenate([head["weight"] for head in heads.values()], -1)
    bias = jnp.concatenate([head["bias"] for head in heads.values()])

    @jax.jit
    def classify(data):
        logits = views.logits(data, weight) + bias
        return logits.reshape(*logits.shape[:-1], len(heads), classes).argmax(-1).astype(jnp.uint8)

    counts = {name: (Confusion(classes, ignore), Confusion(classes, ignore)) for name in heads}
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in heads}
    for index, (data, labels) in enumerate(ahead(lambda index: views.batch([index], False), range(len(split)))):
        predictions, label = np.asarray(classify(data)), views.arrange(labels)[0]
        band = boundary_band(label, BAND)
        for number, (name, (whole, edges)) in enumerate(counts.items()):
            prediction = views.arrange(predictions[..., number])[0]
            whole.add(prediction, label)
            edges.add(prediction, label, band)
            if index in shown:
                pictures[name].append(prediction)
    scores = {name: Scores.of(whole, edges) for name, (whole, edges) in counts.items()}
    return scores, {name: np.stack(found) for name, found in pictures.items() if found}
