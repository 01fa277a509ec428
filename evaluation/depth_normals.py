"""Probes for depth and surface normals on frozen upsampled features: the protocol of Probe3D on NYUv2, as AnyUp has it.

What is upsampled are the features of the encoder without its final norm; the class token is put beside them afterwards.
Where the encoder gives several layers, all are upsampled at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from evaluation import heads, losses, sheet
from evaluation.config import Config, Size
from evaluation.data.augment import draw_part, jitter
from evaluation.data.nyu import Scene, Scenes
from evaluation.fitting import Told, epoch_order, fit
from evaluation.frozen import encode
from evaluation.methods import Method
from evaluation.metrics.depth import depth_scores
from evaluation.metrics.normals import normal_scores
from evaluation.prefetch import ahead

Batch = dict[str, Any]  # image, features, token (or None), depth, normals
Prediction = Float[np.ndarray, "H W"] | Float[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a task predicts.

    Attributes:
        outputs: channels of the head.
        loss: of the head's output and a batch.
        predict: makes depth or normals of the head's output, at a size.
        score: of a prediction and its scene.
        truth: what is predicted of a scene.
        paint: makes a picture of truth or of a prediction.
    """

    outputs: int
    loss: Callable[[Array, Batch], Array]
    predict: Callable[[Array, Size], Array]
    score: Callable[[Prediction, Scene], dict[str, float]]
    truth: Callable[[Scene], Prediction]
    paint: sheet.Paint


def _depth_loss(raw, batch):
    target = batch["depth"]
    return losses.depth_loss(heads.depth_of(raw, target.shape[1:3]), target, target > 0)


def _normal_loss(raw, batch):
    target = batch["normals"]
    return losses.normal_loss(*heads.normals_of(raw, target.shape[1:3]), target, (target != 0).any(-1))


def _depth_scores(prediction: Prediction, scene: Scene) -> dict[str, float]:
    valid = scene.depth > 0
    aligned = depth_scores(prediction, scene.depth, valid, aligned=True)
    return depth_scores(prediction, scene.depth, valid, aligned=False) | {f"aligned_{k}": v for k, v in aligned.items()}


KINDS = {
    "depth": Kind(
        heads.DEPTH_OUTPUTS, _depth_loss, heads.depth_of, _depth_scores, lambda scene: scene.depth, sheet.paint_depth
    ),
    "normals": Kind(
        heads.NORMAL_OUTPUTS,
        _normal_loss,
        lambda raw, size: heads.normals_of(raw, size)[0],
        lambda prediction, scene: normal_scores(prediction, scene.normals, scene.normals.any(-1)),
        lambda scene: scene.normals,
        sheet.paint_normals,
    ),
}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A head behind an encoder and a method.

    Attributes:
        encoder: gives the features, and the class token where that is wanted.
        method: upsamples the features.
        config: the evaluation.
        graph: the head without its parameters.
    """

    encoder: Any
    method: Method
    config: Config
    graph: nnx.GraphDef

    @classmethod
    def create(cls, encoder: Any, method: Method, config: Config) -> tuple[Probe, dict[str, Any]]:
        """Return the probe and the head's initial parameters."""
        kind = dict(linear=heads.Linear, dpt=heads.DPT)[config.probe.head]
        widths = [width * (1 + config.probe.class_token) for width in encoder.widths]
        channels = widths if len(widths) > 1 else widths[0]
        head = kind(channels, KINDS[config.task].outputs, rngs=nnx.Rngs(config.seed))
        graph, state = nnx.split(head)
        return cls(encoder, method, config, graph), nnx.to_pure_dict(state)

    @property
    def kind(self) -> Kind:
        """What is predicted."""
        return KINDS[self.config.task]

    def read(self, scenes: Scenes, chosen: tuple[Sequence[int], int | None]) -> Batch:
        """Return a batch of scenes and their features; augmented with a seed, as they are with None."""
        indices, seed = chosen
        found = []
        for index in indices:
            if seed is None:
                found.append(scenes.read(index))
                continue
            rng = np.random.default_rng((self.config.seed, seed, index))
            scene = scenes.read(index, draw_part(rng))
            found.append(scene._replace(image=jitter(scene.image, rng)))
        image, depth, normals = map(np.stack, zip(*found))
        features = encode(self.encoder, image, self.method.enlarge)
        features, token = features if self.config.probe.class_token else (features, None)
        return dict(image=image, features=features, token=token, depth=depth, normals=normals)

    def raw(self, parameters: Mapping[str, Any], batch: Batch) -> Float[Array, "B H W outputs"]:
        """Return the head's output."""
        head = nnx.merge(self.graph, nnx.State(parameters))
        size = batch["image"].shape[1:3]
        image = jnp.asarray(batch["image"], jnp.float32) / 255
        dense = self.method(image, batch["features"], size)
        ends = np.cumsum(self.encoder.widths)[:-1]
        maps = jnp.split(dense, ends, -1)
        if batch["token"] is not None:
            tokens = jnp.split(batch["token"], ends, -1)
            spread = (jnp.broadcast_to(token[:, None, None], (*dense.shape[:3], token.shape[-1])) for token in tokens)
            maps = [jnp.concatenate(pair, -1) for pair in zip(maps, spread)]
        return head(maps, size)

    def loss(self, parameters: Mapping[str, Any], batch: Batch) -> Float[Array, ""]:
        """Return the loss of a batch."""
        return self.kind.loss(self.raw(parameters, batch), batch)


def train(
    probe: Probe, head: dict[str, Any], scenes: Scenes, saved: Path, about: Mapping[str, Any], say: Told
) -> dict[str, Any]:
    """Train a head from its initial parameters and return them; `saved`, `about`, `say` and errors as for `fit`."""
    config = probe.config

    def order(epoch: int):
        for indices, _ in epoch_order(len(scenes), config.probe, config.seed, epoch):
            yield indices, epoch if config.probe.augment else None

    read = functools.partial(probe.read, scenes)
    return fit(head, probe.loss, read, order, config.probe, len(scenes), saved, about, say)


def score(
    probe: Probe, head: Mapping[str, Any], scenes: Scenes, shown: Sequence[int] = ()
) -> tuple[dict[str, float], Float[np.ndarray, "N H W *_"] | None]:
    """Score a head on a split: the mean over the images that have anything to score.

    Args:
        probe, head: what is scored.
        scenes: the split.
        shown: the images whose predictions are wanted too, in rising order.

    Returns:
        The scores, and the predictions of the images to be shown, None if there are none.

    Raises:
        ValueError: if no image has anything to score.
    """

    @jax.jit
    def predict(head, batch):
        return probe.kind.predict(probe.raw(head, batch), batch["image"].shape[1:3])

    found, pictures = [], []
    for index, batch in enumerate(ahead(lambda index: probe.read(scenes, ([index], None)), range(len(scenes)))):
        prediction = np.asarray(predict(head, batch)[0])
        scene = Scene(*(batch[name][0] for name in ("image", "depth", "normals")))
        if scores := probe.kind.score(prediction, scene):
            found.append(scores)
        if index in shown:
            pictures.append(prediction)
    if not found:
        raise ValueError(f"None of the {len(scenes)} images has known {probe.config.task}; take another split.")
    means = {name: float(np.mean([scores[name] for scores in found])) for name in found[0]}
    return means, np.stack(pictures) if pictures else None
