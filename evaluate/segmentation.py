"""The linear probe for segmentation: one 1 x 1 convolution on frozen upsampled features.

The protocol is that of JAFAR (Couairon et al., 2025) with AnyUp's correction of the schedule. Since every method is
linear in what it upsamples, the head is applied at low resolution and its logits are upsampled: the same numbers for a
fraction of the memory and time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8
from safetensors.numpy import load_file, save_file

from anyup_jax.files import replacing
from evaluate.config import Config, ProbeConfig
from evaluate.frozen import Views
from evaluate.metrics.segmentation import Confusion, boundary_band
from evaluate.schedules import schedule

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


def epoch_order(count: int, probe: ProbeConfig, seed: int, epoch: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the images of every batch of an epoch, and whether the batch is mirrored; the last one may be smaller."""
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(count)
    for start in range(0, count, probe.batch_size):
        yield order[start : start + probe.batch_size], probe.flip and bool(random.random() < 0.5)


def train(
    views: Views, count: int, channels: int, classes: int, ignore: int, config: Config, saved: Path,
    say: Callable[[int, float], None],
) -> Head:  # fmt: skip
    """Train the probe and return it.

    Args:
        views: the training split.
        count: images in it.
        channels: of the features.
        classes, ignore: of the labels.
        config: the evaluation.
        saved: the file the state is written to after every epoch; training goes on from there if it exists.
        say: told the epoch and its mean loss.
    """
    probe = config.probe
    steps = -(-count // probe.batch_size)
    optimizer = optax.adamw(schedule(probe, steps), weight_decay=probe.weight_decay)
    head = init_head(channels, classes, config.seed)
    state = dict(head=head, optimizer=optimizer.init(head))
    first, state = restore(saved, state)

    @jax.jit
    def step(state, data, labels):
        def loss(head):
            logits = views.logits(data, head["weight"]) + head["bias"]
            return cross_entropy(logits, labels, ignore)

        value, gradient = jax.value_and_grad(loss)(state["head"])
        updates, moments = optimizer.update(gradient, state["optimizer"], state["head"])
        return dict(head=optax.apply_updates(state["head"], updates), optimizer=moments), value

    for epoch in range(first, probe.epochs):
        losses = []
        for indices, mirror in epoch_order(count, probe, config.seed, epoch):
            state, value = step(state, *views.batch(indices, mirror))
            losses.append(value)
        mean = float(np.mean(jax.device_get(losses)))
        save(saved, epoch + 1, state)
        say(epoch + 1, mean)
    return state["head"]


def save(path: Path, epoch: int, state: Any) -> None:
    """Write the state after an epoch."""
    leaves, _ = jax.tree.flatten(state)
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)} | {"epoch": np.asarray(epoch)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(arrays, temporary)


def restore(path: Path, state: Any) -> tuple[int, Any]:
    """Return the epochs that are done and the state after them; the given state if there is none."""
    if not path.is_file():
        return 0, state
    arrays = load_file(path)
    leaves, structure = jax.tree.flatten(state)
    loaded = [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]
    return int(arrays["epoch"]), jax.tree.unflatten(structure, loaded)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of a probe on the validation split, each from 0 to 1.

    Attributes:
        mean_iou, band_iou: mean over the classes that occur, of all pixels and of those within 4 pixels of an edge.
        accuracy: share of the pixels that are right.
        classes, band_classes: intersection over union of each class; NaN for one that does not occur.
    """

    mean_iou: float
    band_iou: float
    accuracy: float
    classes: tuple[float, ...]
    band_classes: tuple[float, ...]


Predict = Callable[[int], UInt8[np.ndarray, "H W"]]


def predictor(views: Views, head: Head) -> Predict:
    """Return a function from the number of an image to the class of each of its pixels."""

    @jax.jit
    def classify(data):
        logits = views.logits(data, head["weight"]) + head["bias"]
        return logits.argmax(-1).astype(jnp.uint8)

    return lambda index: views.arrange(np.asarray(classify(views.batch([index], False)[0])))[0]


def score(predict: Predict, labels: Callable[[int], UInt8[np.ndarray, "H W"]], count: int, classes: int,
          ignore: int) -> Scores:  # fmt: skip
    """Score predictions of a whole split; every pixel counts the same, in whichever image it is."""
    whole, band = Confusion(classes, ignore), Confusion(classes, ignore)
    for index in range(count):
        label, prediction = labels(index), predict(index)
        whole.add(prediction, label)
        band.add(prediction, label, boundary_band(label, BAND))
    rows = (tuple(float(x) for x in confusion.iou()) for confusion in (whole, band))
    return Scores(whole.mean_iou(), band.mean_iou(), whole.pixel_accuracy(), *rows)
