"""One optimizer step as a pure function: views, features, objective, gradient, AdamW, average."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from anyup_core.preprocessing import IMAGENET
from anyup_jax.layers import Unused
from anyup_jax.model import AnyUp
from train import optim, sharding
from train.config import Config, FeaturesConfig, Size
from train.loss import Views, cut_crops, objective

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        step: optimizer steps done.
        params: trained parameters, float32, an `nnx.State`; moments and average have its structure.
        carried: published weights that never reach the output, and are never trained.
        optimizer: count and moments.
        ema: moving average of `params`, or None.
        ok: False once a loss or gradient was not finite; from then on steps change nothing.
    """

    step: Int[Array, ""]
    params: Any
    carried: Any
    optimizer: optim.Moments
    ema: Any
    ok: Bool[Array, ""]


def init_state(config: Config, model: AnyUp) -> tuple[nnx.GraphDef, TrainState]:
    """Return the model's structure, and the state before the first step with its parameters."""
    graph, params, carried = nnx.split(model, nnx.Param, Unused)
    ema = None if config.optimizer.ema_decay is None else jax.tree.map(jnp.array, params)
    moments = optim.init(config.optimizer, params)
    return graph, TrainState(jnp.zeros((), jnp.int32), params, carried, moments, ema, jnp.array(True))


def state_specs(state: TrainState, kind: str, mesh: Mesh) -> TrainState:
    """Return how every array of the state is kept on the mesh."""
    spread = functools.partial(sharding.specs, kind=kind, mesh=mesh)
    whole = PartitionSpec()
    moments = optim.Moments(whole, spread(state.optimizer.mu), spread(state.optimizer.nu))
    carried = jax.tree.map(lambda _: whole, state.carried)
    return TrainState(whole, spread(state.params), carried, moments, spread(state.ema), whole)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a step, which depend on the encoder's patch and on what is drawn for the step.

    Attributes:
        patch: pixels a cell.
        crop: height and width of the photograph.
        view: height and width of the crops.
        whole: height and width at which the encoder sees the whole photograph.
        guidance: height and width of the whole photograph as guidance.
        consistency: height and width at which consistency is measured.
        share: of the encoder's channels.
    """

    patch: int
    crop: Size
    view: Size
    whole: Size
    guidance: Size
    consistency: Size
    share: float = 1.0

    @property
    def cells(self) -> Size:
        """Of the upsampled map."""
        return self.crop[0] // self.patch, self.crop[1] // self.patch

    @property
    def crop_cells(self) -> Size:
        return self.view[0] // self.patch, self.view[1] // self.patch

    def corners(self, uniform: Float[Array, "B n 2"]) -> Int[Array, "B n 2"]:
        """Return corners of crops in cells, every possible one as likely, from numbers in [0, 1)."""
        free = jnp.array([cells - crop + 1 for cells, crop in zip(self.cells, self.crop_cells)])
        return jnp.minimum((uniform * free).astype(jnp.int32), free - 1)


Encode = Callable[[Float[Array, "B H W 3"]], Float[Array, "B h w C"]]


def lr_view(image: UInt8[Array, "B H W 3"], size: Size) -> Float[Array, "B h w 3"]:
    """Return photographs with values in [0, 1] at another size, bilinear and antialiased."""
    image = image.astype(jnp.float32) / 255
    if image.shape[1:3] == size:
        return image
    return jax.image.resize(image, (len(image), *size, 3), "bilinear", antialias=True)


def features_of(
    encode: Encode, batch: Batch, geometry: Geometry
) -> tuple[Float[Array, "B h w C"], Float[Array, "B n hc wc C"]]:
    """Return an encoder's features of the whole photographs and of their crops."""
    image, crops = batch["image"], geometry.corners(batch["crops"])
    cut = cut_crops(image, crops * geometry.patch, geometry.view).astype(jnp.float32) / 255
    lr = encode(lr_view(image, geometry.whole))
    hr = encode(cut.reshape(-1, *cut.shape[2:]))
    return lr, hr.reshape(*crops.shape[:2], *hr.shape[1:])


def draw_channels(config: FeaturesConfig, share: float, channels: int, key: PRNGKeyArray) -> Int[Array, " kept"] | None:
    """Return which channels a step works on, in which order; None for all as they are."""
    kept = max(1, round(share * channels))
    if kept == channels and not config.shuffle:
        return None
    drawn = jax.random.permutation(key, channels)[:kept]
    return drawn if config.shuffle else drawn.sort()


def views_of(batch: Batch, geometry: Geometry, lr: Array, hr: Array, pasted: int) -> Views:
    """Return what the objective compares, given the features and how many regions are pasted onto a photograph."""
    mean, std = (jnp.asarray(x, jnp.float32) for x in IMAGENET)
    clean, augmented = ((lr_view(batch[name], geometry.guidance) - mean) / std for name in ("image", "augmented"))
    regions = jax.nn.one_hot(batch["regions"], 1 + pasted) if pasted else None
    return Views(clean, augmented, lr, hr, geometry.corners(batch["crops"]), regions)


def make_step(
    config: Config,
    graph: nnx.GraphDef,
    specs: TrainState,
    geometry: Geometry,
    mesh: Mesh,
    encoder: tuple[nnx.GraphDef, Any] | None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Return the compiled step `(state, encoder state, batch) -> (state, metrics)`; the state is overwritten.

    Every device computes the gradient for photographs of its own; only gradients and the metrics travel.

    Args:
        config: the run.
        graph: structure of the model.
        specs: how the state is kept, from `state_specs`.
        geometry: the sizes.
        mesh: the devices.
        encoder: structure of a Flax encoder and how its state is kept; None where the batch brings "lr" and "hr".
    """
    rate_at = optim.schedule(config.optimizer, config.max_steps)

    def loss(params, carried, step, batch, encode):
        model = nnx.merge(graph, sharding.gather(params, specs.params), carried)
        lr, hr = (batch["lr"], batch["hr"]) if encode is None else features_of(encode, batch, geometry)
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        if (chosen := draw_channels(config.features, geometry.share, lr.shape[-1], key)) is not None:
            lr, hr = (x[..., chosen] for x in (lr, hr))
        views = views_of(batch, geometry, *lax.stop_gradient((lr, hr)), config.dataset.pasted_regions)
        terms = objective(model, views, geometry.cells, geometry.consistency, config.loss, remat=config.remat)
        return sum(terms.values()), terms

    def local(state, encoder_state, batch):
        encode = None
        if encoder is not None:
            module = nnx.merge(encoder[0], sharding.gather(encoder_state, encoder[1]))
            encode = lambda image: module(module.normalize(image))  # noqa: E731

        def part(batch):
            (value, terms), gradients = jax.value_and_grad(loss, has_aux=True)(
                state.params, state.carried, state.step, batch, encode
            )
            return gradients, terms | dict(loss=value)

        gradients, metrics = in_parts(part, batch, config.optimizer.accumulate)
        gradients, norm = reduce(gradients, specs.params, mesh)
        metrics = lax.pmean(metrics, sharding.AXES)
        return advance(state, gradients, norm, metrics)

    def advance(state, gradients, norm, metrics):
        rate = rate_at(state.step)
        params, moments = optim.update(config.optimizer, rate, gradients, norm, state.optimizer, state.params)
        ema = state.ema
        if ema is not None:
            ema = optim.average(config.optimizer.ema_decay, ema, params, state.step)
        ok = state.ok & jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        moved = TrainState(state.step + 1, params, state.carried, moments, ema, ok)
        kept = dataclasses.replace(state, ok=ok)
        state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), moved, kept)
        return state, metrics | dict(gradient_norm=norm, learning_rate=jnp.asarray(rate, jnp.float32), ok=ok)

    encoder_specs = PartitionSpec() if encoder is None else encoder[1]
    inside = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, encoder_specs, sharding.BATCH),
        out_specs=(specs, PartitionSpec()),
        check_vma=False,
    )
    return jax.jit(inside, donate_argnums=0)


def in_parts(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """Return the mean of a function over equal parts of a batch, one after the other, so that one is in memory."""
    if parts == 1:
        return function(batch)
    pieces = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = lax.scan(lambda sums, piece: (jax.tree.map(jnp.add, sums, function(piece)), None), zeros, pieces)
    return jax.tree.map(lambda x: x / parts, sums)


def reduce(gradients: Any, specs: Any, mesh: Mesh) -> tuple[Any, Float[Array, ""]]:
    """Average gradients over all devices, within `shard_map`, and return the norm of the whole.

    Of a parameter that is spread, the gradient is already added up over the axis `model`, each device with its part.
    """

    def mean(x, spec):
        return lax.psum(x, sharding.AXES if sharding.sharded_axis(spec) is None else "data") / mesh.size

    gradients = jax.tree.map(mean, gradients, specs)
    squares = {True: jnp.zeros(()), False: jnp.zeros(())}
    for x, spec in zip(jax.tree.leaves(gradients), jax.tree.leaves(specs)):
        squares[sharding.sharded_axis(spec) is not None] += jnp.square(x).sum()
    spread = lax.psum(squares[True], "model") if mesh.shape["model"] > 1 else squares[True]
    return gradients, jnp.sqrt(squares[False] + spread)
