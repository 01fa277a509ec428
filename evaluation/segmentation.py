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

from evaluation.config import Config
from evaluation.fitting import Told, epoch_order, fit
from evaluation.frozen import Split, Views
from evaluation.metrics.segmentation import Confusion, boundary_band
from evaluation.prefetch import ahead

BAND = 4  # pixels on either side of a label's edge

Head = dict[str, Float[Array, "..."]]  # a linear probe; or several, along the first axis


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
    """Train `probe.repeats` probes and return them, along the first axis.

    Each is what it would be by itself: they share the batches, and nothing else.

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

    def loss(heads, batch):
        data, labels = batch
        logits = several(views, data, heads)
        return sum(cross_entropy(logits[..., i, :], labels, ignore) for i in range(probe.repeats))

    heads = initial(channels, len(split.examples.classes), config)
    order = functools.partial(epoch_order, len(split), probe, config.seed)

    def told(epoch, total):
        say(epoch, total / probe.repeats)

    return fit(heads, loss, lambda batch: views.batch(*batch), order, probe, len(split), saved, about, told)


def initial(channels: int, classes: int, config: Config) -> Head:
    """Return the probes before they are trained, with the seeds from `seed` on."""
    heads = [init_head(channels, classes, config.seed + i) for i in range(config.probe.repeats)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *heads)


def several(views: Views, data: dict[str, Any], heads: Head) -> Float[Array, "B ... N K"]:
    """Return what several probes say of a batch, which is upsampled once."""
    weight, bias = heads["weight"], heads["bias"]
    logits = views.logits(data, weight.transpose(1, 0, 2).reshape(weight.shape[1], -1))
    return logits.reshape(*logits.shape[:-1], *bias.shape) + bias


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of probes on the validation split, means over them, each from 0 to 1.

    Attributes:
        mean_iou, band_iou: mean over the classes that occur, of all pixels and of those within 4 pixels of an edge.
        accuracy: share of the pixels that are right.
        classes, band_classes: intersection over union of each class; None for one that does not occur.
        mean_iou_std, band_iou_std: standard deviations over the probes.
    """

    mean_iou: float
    band_iou: float
    accuracy: float
    classes: tuple[float | None, ...]
    band_classes: tuple[float | None, ...]
    mean_iou_std: float
    band_iou_std: float

    @classmethod
    def of(cls, counted: Sequence[tuple[Confusion, Confusion]]) -> Scores:
        """Return the means of the scores of what was counted of all pixels and of those near an edge."""
        wholes, bands = zip(*counted)
        values = [(x.mean_iou(), y.mean_iou(), x.pixel_accuracy()) for x, y in counted]
        rows = (np.mean([x.iou() for x in many], 0) for many in (wholes, bands))  # what occurs is the same for all
        classes = (tuple(None if np.isnan(x) else float(x) for x in row) for row in rows)
        return cls(*map(float, np.mean(values, 0)), *classes, *map(float, np.std(values, 0)[:2]))


def score(
    views: Views, split: Split, heads: Mapping[str, Head], shown: Sequence[int] = ()
) -> tuple[dict[str, Scores], dict[str, UInt8[np.ndarray, "N H W"]]]:
    """Score probes on a whole split, which is gone through once; every pixel counts the same.

    Args:
        views: of the split.
        split: the images.
        heads: a name for each of several, as `train` returns them.
        shown: the images whose predictions are wanted too, in rising order.

    Returns:
        The scores, means over the probes of a name, and the classes that its first one predicts of the images to be
        shown.
    """
    classes, ignore = len(split.examples.classes), split.examples.ignore
    owners = [name for name, found in heads.items() for _ in found["bias"]]
    every = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *heads.values())
    classify = jax.jit(lambda data: several(views, data, every).argmax(-1).astype(jnp.uint8))
    counts = [(Confusion(classes, ignore), Confusion(classes, ignore)) for _ in owners]
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in heads}
    for index, (data, labels) in enumerate(ahead(lambda index: views.batch([index], False), range(len(split)))):
        predictions, label = np.asarray(classify(data)), views.arrange(labels)[0]
        band = boundary_band(label, BAND)
        for number, (name, (whole, edges)) in enumerate(zip(owners, counts)):
            prediction = views.arrange(predictions[..., number])[0]
            whole.add(prediction, label)
            edges.add(prediction, label, band)
            if index in shown and number == owners.index(name):
                pictures[name].append(prediction)
    scores = {name: Scores.of([c for owner, c in zip(owners, counts) if owner == name]) for name in heads}
    return scores, {name: np.stack(found) for name, found in pictures.items() if found}
