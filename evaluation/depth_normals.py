"""Probes for depth and surface normals on frozen upsampled features: the protocol of Probe3D on NYUv2, as in AnyUp.

The features of the encoder without its final norm are upsampled, all layers at once; the class token is concatenated to
them afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from flax import nnx
from jaxtyping import Array, Float

from anyup_core.encoders.frozen import FrozenEncoder
from evaluation import heads, losses, sheet
from evaluation.config import Config, Size
from evaluation.data.augment import draw_part, jitter
from evaluation.data.nyu import Scene, Scenes
from evaluation.fitting import Parameters, ProbeFile, Report, Training, epoch_order, fit
from evaluation.frozen import encode
from evaluation.methods import Method
from evaluation.metrics import average_over_images
from evaluation.metrics.depth import depth_scores
from evaluation.metrics.normals import normal_scores
from evaluation.prefetch import prefetch

Batch = dict[str, Any]  # arrays: image, features, token (or None), depth, normals
Selection = tuple[Sequence[int], int | None]  # the scenes of a batch, and the seed of their augmentation
Prediction = Float[np.ndarray, "H W"] | Float[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a task predicts.

    Attributes:
        outputs: channels of the head.
        loss: of the head's output and a batch.
        predict: turns the head's output into depth or normals of a size.
        score: of a prediction and its scene.
        truth: the depth or the normals of a scene.
        paint: draws the truth or a prediction.
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
    """A head on the upsampled features of an encoder.

    Attributes:
        encoder: returns the features, and the class token if `probe.class_token` is set.
        method: upsamples the features.
        config: the evaluation.
        graph: the head without its parameters.
    """

    encoder: FrozenEncoder
    method: Method
    config: Config
    graph: nnx.GraphDef

    @classmethod
    def create(cls, encoder: FrozenEncoder, method: Method, config: Config) -> tuple[Probe, Parameters]:
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

    def read(self, scenes: Scenes, selection: Selection) -> Batch:
        """Return a batch of scenes and their features; augmented if the selection has a seed."""
        indices, seed = selection
        image, depth, normals = map(np.stack, zip(*(self._read_scene(scenes, index, seed) for index in indices)))
        features = encode(self.encoder, image, self.method.enlarge)
        features, token = features if self.config.probe.class_token else (features, None)
        return dict(image=image, features=features, token=token, depth=depth, normals=normals)

    def _read_scene(self, scenes: Scenes, index: int, seed: int | None) -> Scene:
        if seed is None:
            return scenes.read(index)
        rng = np.random.default_rng((self.config.seed, seed, index))
        scene = scenes.read(index, draw_part(rng))
        return scene._replace(image=jitter(scene.image, rng))

    def raw(self, parameters: Parameters, batch: Batch) -> Float[Array, "B H W outputs"]:
        """Return the head's output."""
        head = nnx.merge(self.graph, nnx.State(parameters))
        size = batch["image"].shape[1:3]
        image = jnp.asarray(batch["image"], jnp.float32) / 255
        dense = self.method(image, batch["features"], size)
        ends = np.cumsum(self.encoder.widths)[:-1]
        maps = jnp.split(dense, ends, -1)
        if batch["token"] is not None:
            tokens = jnp.split(repeat(batch["token"], "b c -> b h w c", h=size[0], w=size[1]), ends, -1)
            maps = [jnp.concatenate(pair, -1) for pair in zip(maps, tokens)]
        return head(maps, size)

    def loss(self, parameters: Parameters, batch: Batch) -> Float[Array, ""]:
        """Return the loss of a batch."""
        return self.kind.loss(self.raw(parameters, batch), batch)


def train(probe: Probe, head: Parameters, scenes: Scenes, file: ProbeFile, report: Report) -> Parameters:
    """Train a head from its initial parameters and return them; `file`, `report` and errors as in `fitting`."""
    config = probe.config

    def order(epoch: int) -> Iterator[Selection]:
        for indices, _ in epoch_order(len(scenes), config.probe, config.seed, epoch):
            yield indices, epoch if config.probe.augment else None

    read = functools.partial(probe.read, scenes)
    training = Training(
        loss=probe.loss, order=order, read=read, images=len(scenes), probe=config.probe, file=file, report=report
    )
    return fit(head, training)


def score(
    probe: Probe, head: Parameters, scenes: Scenes, shown: Sequence[int] = ()
) -> tuple[dict[str, float], Float[np.ndarray, "N H W *_"] | None]:
    """Score a head on a split: the mean over the images that have anything to score.

    Args:
        probe, head: the probe and the parameters of its head.
        scenes: the split.
        shown: the images whose predictions are returned too, in rising order.

    Returns:
        The scores, and the predictions of the images to be shown, None if there are none.

    Raises:
        ValueError: if no image has anything to score.
    """

    @jax.jit
    def predict(head, batch):
        return probe.kind.predict(probe.raw(head, batch), batch["image"].shape[1:3])

    scores, pictures = [], []
    for index, batch in enumerate(prefetch(lambda index: probe.read(scenes, ([index], None)), range(len(scenes)))):
        prediction = np.asarray(predict(head, batch)[0])
        scores.append(probe.kind.score(prediction, Scene(*(batch[name][0] for name in Scene._fields))))
        if index in shown:
            pictures.append(prediction)
    means, _ = average_over_images(scores)
    if not means:
        raise ValueError(f"None of the {len(scenes)} images has known {probe.config.task}; take another split.")
    return means, np.stack(pictures) if pictures else None
