"""The linear probe for segmentation: one 1 x 1 convolution on frozen upsampled features.

The protocol is that of JAFAR (Couairon et al., 2025) with AnyUp's correction of the schedule. Where a method averages
what it upsamples, the head is applied at low resolution and its logits are upsampled: the same numbers for a fraction
of the memory and time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from evaluation.config import Config
from evaluation.data import Examples
from evaluation.fitting import ProbeFile, fit, prefetch
from evaluation.frozen import Arrays, Views
from evaluation.metrics import Confusion, boundary_band

BAND = 4  # pixels on either side of a label's edge

Head = dict[str, Float[Array, "..."]]  # weight (C, K) and bias (K,) of a probe; or of N probes, stacked along axis 0


def init_head(channels: int, classes: int, seed: int) -> Head:
    """Return weight (C, K) and bias (K,) as PyTorch initialises a 1 x 1 convolution: uniform up to 1 / sqrt(C)."""
    bound = channels**-0.5
    keys = jax.random.split(jax.random.key(seed))
    draw = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
    return dict(weight=draw(keys[0], (channels, classes)), bias=draw(keys[1], (classes,)))


def init_heads(channels: int, classes: int, config: Config) -> Head:
    """Return `probe.repeats` probes before training, stacked; their seeds are `seed`, `seed + 1` and so on."""
    heads = [init_head(channels, classes, config.seed + i) for i in range(config.probe.repeats)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *heads)


def cross_entropy(logits: Float[Array, "... K"], labels: UInt8[Array, "..."], ignore: int) -> Float[Array, ""]:
    """Return the mean over all pixels whose label is not `ignore`; 0 if there are none."""
    valid = labels != ignore
    picked = jnp.where(valid, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, picked)
    return jnp.where(valid, losses, 0).sum() / jnp.maximum(valid.sum(), 1)


def probe_logits(views: Views, data: Arrays, heads: Head) -> Float[Array, "B ... N K"]:
    """Return the logits of N stacked probes for a batch, applied at low resolution and upsampled at once."""
    weight = rearrange(heads["weight"], "n c k -> c (n k)")
    if views.method.linear:
        logits = views.upsample(data, jnp.matmul(data["features"], weight, precision="highest"))
    else:
        logits = jnp.matmul(views.upsample(data), weight, precision="highest")
    return rearrange(logits, "... (n k) -> ... n k", n=len(heads["bias"])) + heads["bias"]


def train(views: Views, split: Examples, channels: int, config: Config, file: ProbeFile) -> Head:
    """Train `probe.repeats` probes and return them, stacked.

    They share the batches and nothing else: each is the probe that training it alone gives.

    Args:
        views: of the training split.
        split: the training split.
        channels: of the features.
        config: the evaluation.
        file: as in `fitting.fit`.

    Raises:
        ValueError: if the file is damaged or was written with other settings.
    """
    probe, ignore = config.probe, split.ignore

    def loss(heads, batch):
        data, labels = batch
        logits = probe_logits(views, data, heads)
        return sum(cross_entropy(logits[..., i, :], labels, ignore) for i in range(probe.repeats))

    heads = init_heads(channels, len(split.classes), config)
    return fit(heads, loss, lambda _, *selection: views.batch(*selection), len(split), config, file)


class Scores(NamedTuple):
    """The scores of probes on the validation split, from 0 to 1.

    Attributes:
        means: over the probes: `mIoU` and `band_mIoU`, means over the classes that occur, of all pixels and of those
            within 4 pixels of an edge; `accuracy`, the share of the pixels that are right.
        deviations: standard deviations of the same scores.
        classes: `iou` and `band_iou`, the means of the intersection over union of each class; None for a class that
            does not occur.
    """

    means: dict[str, float]
    deviations: dict[str, float]
    classes: dict[str, list[float | None]]


def score(
    views: Views, split: Examples, heads: Mapping[str, Head], shown: Sequence[int] = ()
) -> tuple[dict[str, Scores], dict[str, UInt8[np.ndarray, "N H W"]]]:
    """Score probes on a whole split in one pass; every pixel counts the same.

    Args:
        views: of the split.
        split: the images.
        heads: stacked probes, as `train` returns them, by name.
        shown: the images whose predictions are returned too, in rising order.

    Returns:
        For every name the scores, means over its probes, and the classes that its first probe predicts of the images
        to be shown.
    """
    classes, ignore = len(split.classes), split.ignore
    owners = [name for name, head in heads.items() for _ in head["bias"]]
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *heads.values())
    classify = jax.jit(lambda data: probe_logits(views, data, stacked).argmax(-1).astype(jnp.uint8))
    counts = [(Confusion(classes, ignore), Confusion(classes, ignore)) for _ in owners]
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in heads}
    for index, (data, labels) in enumerate(prefetch(lambda index: views.batch([index], False), range(len(split)))):
        predictions, label = np.asarray(classify(data)), views.arrange(labels)[0]
        band = boundary_band(label, BAND)
        for number, (name, (whole, edges)) in enumerate(zip(owners, counts)):
            prediction = views.arrange(predictions[..., number])[0]
            whole.add(prediction, label)
            edges.add(prediction, label, band)
            if index in shown and number == owners.index(name):
                pictures[name].append(prediction)
    scores = {name: _scores([c for owner, c in zip(owners, counts) if owner == name]) for name in heads}
    return scores, {name: np.stack(images) for name, images in pictures.items() if images}


def _scores(confusions: Sequence[tuple[Confusion, Confusion]]) -> Scores:
    """Return the scores of probes, given for each the counts of all pixels and of those near an edge."""
    names = "mIoU", "band_mIoU", "accuracy"
    values = [(whole.mean_iou(), band.mean_iou(), whole.pixel_accuracy()) for whole, band in confusions]
    means, deviations = (dict(zip(names, map(float, f(values, 0)))) for f in (np.mean, np.std))
    rows = (np.mean([x.iou() for x in region], 0).tolist() for region in zip(*confusions))
    classes = ([None if math.isnan(x) else x for x in row] for row in rows)
    return Scores(means, deviations, dict(zip(("iou", "band_iou"), classes)))
