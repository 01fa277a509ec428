"""Probes for depth and surface normals on frozen upsampled features: the protocol of Probe3D on NYUv2, as in AnyUp.

The features of the encoder without its final norm are upsampled, all layers at once; the class token is concatenated to
them afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from flax import nnx
from jaxtyping import Array, Float

from anyup_core.encoders.frozen import FrozenEncoder
from evaluation import heads
from evaluation.config import Config
from evaluation.data.nyu import Scene, Scenes, draw_part, jitter
from evaluation.fitting import Parameters, ProbeFile, fit, prefetch
from evaluation.frozen import encode
from evaluation.methods import Method
from evaluation.metrics import average_over_images, depth_scores, normal_scores

Batch = dict[str, Any]  # arrays: image, features, token (or None), depth, normals


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
        head = dict(linear=heads.Linear, dpt=heads.DPT)[config.probe.head]
        widths = [width * (1 + config.probe.class_token) for width in encoder.widths]
        graph, state = nnx.split(head(widths, heads.OUTPUTS[config.task], rngs=nnx.Rngs(config.seed)))
        return cls(encoder, method, config, graph), nnx.to_pure_dict(state)

    def read(self, scenes: Scenes, indices: Sequence[int], seed: int | None = None) -> Batch:
        """Return a batch of scenes and their features; augmented if there is a seed."""

        def augmented(index: int) -> Scene:
            rng = np.random.default_rng((self.config.seed, seed, index))
            scene = scenes.read(index, draw_part(rng))
            return scene._replace(image=jitter(scene.image, rng))

        image, depth, normals = map(np.stack, zip(*map(scenes.read if seed is None else augmented, indices)))
        features = encode(self.encoder, image, self.method.enlarge)
        features, token = features if self.config.probe.class_token else (features, None)
        return dict(image=image, features=features, token=token, depth=depth, normals=normals)

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
        raw, target, size = self.raw(parameters, batch), batch[self.config.task], batch["image"].shape[1:3]
        if self.config.task == "depth":
            return heads.depth_loss(heads.depth_of(raw, size), target, target > 0)
        return heads.normal_loss(*heads.normals_of(raw, size), target, (target != 0).any(-1))

    def predict(self, parameters: Parameters, batch: Batch) -> Float[Array, "B H W *_"]:
        """Return the depth or the normals of a batch."""
        raw, size = self.raw(parameters, batch), batch["image"].shape[1:3]
        return heads.depth_of(raw, size) if self.config.task == "depth" else heads.normals_of(raw, size)[0]

    def score(self, prediction: Float[np.ndarray, "H W *_"], scene: Batch) -> dict[str, float]:
        """Return the scores of a scene; empty if nothing of it is known."""
        if self.config.task == "normals":
            return normal_scores(prediction, scene["normals"], scene["normals"].any(-1))
        scores, aligned = (
            depth_scores(prediction, scene["depth"], scene["depth"] > 0, aligned) for aligned in (False, True)
        )
        return scores | {f"aligned_{name}": score for name, score in aligned.items()}


def train(probe: Probe, head: Parameters, scenes: Scenes, file: ProbeFile) -> Parameters:
    """Train a head from its initial parameters and return them; `file` and errors as in `fitting.fit`."""
    config = probe.config

    def read(epoch: int, indices: list[int], mirror: bool) -> Batch:
        return probe.read(scenes, indices, epoch if config.probe.augment else None)

    return fit(head, probe.loss, read, len(scenes), config, file)


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
    """
    predict, scores, pictures = jax.jit(probe.predict), [], []
    for index, batch in enumerate(prefetch(lambda index: probe.read(scenes, [index]), range(len(scenes)))):
        prediction = np.asarray(predict(head, batch)[0])
        scores.append(probe.score(prediction, {name: batch[name][0] for name in Scene._fields}))
        if index in shown:
            pictures.append(prediction)
    return average_over_images(scores), np.stack(pictures) if pictures else None
