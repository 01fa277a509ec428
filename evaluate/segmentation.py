"""The linear probe for segmentation: one 1 x 1 convolution on frozen upsampled features.

The protocol is that of JAFAR (Couairon et al., 2025) with AnyUp's correction of the schedule. Since every method is
linear in what it upsamples, the head is applied at low resolution and its logits are upsampled: the same numbers for a
fraction of the memory and time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8
from safetensors import safe_open
from safetensors.numpy import save_file

from anyup_jax.files import replacing
from evaluate.ahead import ahead
from evaluate.config import Config, ProbeConfig
from evaluate.frozen import Split, Views
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
    views: Views, split: Split, channels: int, config: Config, saved: Path, about: Mapping[str, Any],
    say: Callable[[int, float], None],
) -> Head:  # fmt: skip
    """Train the probe and return it.

    Args:
        views: of the training split.
        split: the training split.
        channels: of the features.
        config: the evaluation.
        saved: the file the state is written to after every epoch; training goes on from there if it exists.
        about: all that the probe depends on, in terms of JSON.
        say: told the epoch and its mean loss.

    Raises:
        ValueError: if the file is of a probe that something else was said of.
    """
    probe, ignore = config.probe, split.examples.ignore
    steps = -(-len(split) // probe.batch_size)
    optimizer = optax.adamw(schedule(probe, steps), weight_decay=probe.weight_decay)
    head = init_head(channels, len(split.examples.classes), config.seed)
    first, state = restore(saved, dict(head=head, optimizer=optimizer.init(head)), about)

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
        order = epoch_order(len(split), probe, config.seed, epoch)
        for data, labels in ahead(lambda batch: views.batch(*batch), order):
            state, value = step(state, data, labels)
            losses.append(value)
        mean = float(np.mean(jax.device_get(losses)))
        save(saved, epoch + 1, state, about)
        say(epoch + 1, mean)
    return state["head"]


def save(path: Path, epoch: int, state: Any, about: Mapping[str, Any]) -> None:
    """Write the state after an epoch."""
    leaves, _ = jax.tree.flatten_with_path(state)
    arrays = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(arrays, temporary, {"epoch": str(epoch), "about": json.dumps(about, sort_keys=True)})


def restore(path: Path, state: Any, about: Mapping[str, Any]) -> tuple[int, Any]:
    """Return the epochs that are done and the state after them; the given state if there is no file.

    Raises:
        ValueError: if something else was said of what is in the file.
    """
    if not path.is_file():
        return 0, state
    with safe_open(path, "numpy") as file:
        said = file.metadata()
        if said["about"] != json.dumps(about, sort_keys=True):
            raise ValueError(
                f"{path} is a probe that was trained with other settings; choose another output_dir, or delete it."
            )
        loaded = jax.tree.map_with_path(lambda key, _: jnp.asarray(file.get_tensor(jax.tree_util.keystr(key))), state)
    return int(said["epoch"]), loaded


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


def score(views: Views, split: Split, heads: Mapping[str, Head]) -> dict[str, Scores]:
    """Score several heads on a whole split, which is gone through once; every pixel counts the same."""
    classes, ignore = len(split.examples.classes), split.examples.ignore
    weight = jnp.concatenate([head["weight"] for head in heads.values()], -1)
    bias = jnp.concatenate([head["bias"] for head in heads.values()])

    @jax.jit
    def classify(data):
        logits = views.logits(data, weight) + bias
        return logits.reshape(*logits.shape[:-1], len(heads), classes).argmax(-1).astype(jnp.uint8)

    counts = {name: (Confusion(classes, ignore), Confusion(classes, ignore)) for name in heads}
    for data, labels in ahead(lambda index: views.batch([index], False), range(len(split))):
        predictions, label = np.asarray(classify(data)), views.arrange(labels)[0]
        band = boundary_band(label, BAND)
        for number, (whole, edges) in enumerate(counts.values()):
            prediction = views.arrange(predictions[..., number])[0]
            whole.add(prediction, label)
            edges.add(prediction, label, band)
    return {name: Scores.of(whole, edges) for name, (whole, edges) in counts.items()}
