"""One optimizer step as pure functions: views, features, objective, gradient, AdamW or NAdam, average."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from anyup_core.encoders.frozen import FrozenEncoder
from anyup_core.preprocessing import IMAGENET
from anyup_jax.encoders.encoder import Encoder
from anyup_jax.upsamplers.featup import FeatUp
from anyup_jax.upsamplers.jafar import JAFAR
from train import optim, others, sharding
from train.config import Config, DatasetConfig, FeaturesConfig, Size
from train.loss import Views, cut_crops, objective
from train.state import TrainState
from train.upsamplers import OtherModel

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """The sizes of a step. They follow from the encoder's patch and from what is drawn at random for the step.

    Attributes:
        patch: pixels of a cell along either axis.
        crop: height and width of the photograph.
        view: height and width of the crops cut from it.
        whole: height and width at which the encoder sees the whole photograph.
        guidance: height and width of the whole photograph as guidance.
        consistency: height and width at which consistency is measured.
        share: share of the encoder's channels that the step works on.
        antialias: whether the whole photograph is made smaller with antialiasing.
    """

    patch: int
    crop: Size
    view: Size
    whole: Size
    guidance: Size
    consistency: Size
    share: float = 1.0
    antialias: bool = True

    @property
    def cells(self) -> Size:
        """Height and width of the upsampled map."""
        return self.crop[0] // self.patch, self.crop[1] // self.patch

    @property
    def crop_cells(self) -> Size:
        """Height and width of the features of a crop."""
        return self.view[0] // self.patch, self.view[1] // self.patch

    def corners(self, uniform: Float[Array, "B n 2"]) -> Int[Array, "B n 2"]:
        """Return the corners of crops, in cells, from numbers in [0, 1); every position is equally likely."""
        free = jnp.array([cells - crop + 1 for cells, crop in zip(self.cells, self.crop_cells)])
        return jnp.minimum((uniform * free).astype(jnp.int32), free - 1)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What is fixed when a step is compiled.

    Attributes:
        config: the run.
        graph: structure of the model.
        specs: PartitionSpec of every array of the state, from `state_specs`.
        sizes: the sizes of the step.
        mesh: the devices.
        encoder, encoder_specs: structure of a Flax encoder and the PartitionSpecs of its state; None and () where the
            batch brings the features "lr" and "hr".
    """

    config: Config
    graph: nnx.GraphDef
    specs: TrainState
    sizes: StepSizes
    mesh: Mesh
    encoder: nnx.GraphDef | None
    encoder_specs: Any = ()


def make_step(plan: StepPlan) -> jax.stages.Wrapped:
    """Return `train_step`, compiled for the mesh; it overwrites the state that it is given.

    Every device computes the gradient of its own photographs; only gradients and metrics travel between devices.
    """
    step = jax.shard_map(
        functools.partial(train_step, plan),
        mesh=plan.mesh,
        in_specs=(plan.specs, plan.encoder_specs, sharding.BATCH),
        out_specs=(plan.specs, PartitionSpec()),
        check_vma=False,
    )
    return jax.jit(step, donate_argnums=0)


def train_step(plan: StepPlan, state: TrainState, encoder_state: Any, batch: Batch) -> tuple[TrainState, Metrics]:
    """Do one step on one device of the mesh, within `shard_map`."""
    weights = sharding.gather(encoder_state, plan.encoder_specs)
    encoder = None if plan.encoder is None else nnx.merge(plan.encoder, weights)

    def differentiate(part):
        return jax.grad(loss_of, has_aux=True)(state.params, plan, state, encoder, part)

    gradients, metrics = in_parts(differentiate, batch, plan.config.optimizer.accumulate)
    gradients, norm = reduce(gradients, plan.specs.params, plan.mesh)
    return updated(plan.config, state, gradients, norm, lax.pmean(metrics, sharding.AXES))


def loss_of(
    params: Any, plan: StepPlan, state: TrainState, encoder: Encoder | None, batch: Batch
) -> tuple[Float[Array, ""], Metrics]:
    """Return the loss of a batch, and the loss with its terms, as a function of the parameters."""
    config, sizes = plan.config, plan.sizes
    model = nnx.merge(plan.graph, sharding.gather(params, plan.specs.params), state.unused)
    if isinstance(config.model, OtherModel):
        terms = other_terms(model, plan, encoder, batch, state.step)
        loss = sum(terms.values())
        return loss, terms | dict(loss=loss)
    lr, hr = low_and_high(plan, encoder, batch)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    if (channels := draw_channels(config.features, sizes.share, lr.shape[-1], key)) is not None:
        lr, hr = lr[..., channels], hr[..., channels]
    clean, augmented = (guidance(batch[name], sizes.guidance, config.dataset) for name in ("image", "augmented"))
    pasted = config.dataset.pasted_regions
    regions = jax.nn.one_hot(batch["regions"], 1 + pasted) if pasted else None
    views = Views(clean, augmented, *lax.stop_gradient((lr, hr)), sizes.corners(batch["crops"]), regions)
    terms = objective(model, views, sizes.cells, sizes.consistency, config.loss, remat=config.remat)
    loss = sum(terms.values())
    return loss, terms | dict(loss=loss)


def low_and_high(
    plan: StepPlan, encoder: Encoder | None, batch: Batch
) -> tuple[Float[Array, "B h w C"], Float[Array, "B n hc wc C"]]:
    """Return the features of the whole photographs and of their crops; the batch brings those of a timm model."""
    if encoder is None:
        return batch["lr"], batch["hr"]
    return features_of(encoder, encoder_views(batch, plan.sizes, plan.config.dataset))


def other_terms(
    model: Any, plan: StepPlan, encoder: Encoder | None, batch: Batch, step: Int[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """Return the terms of another upsampler, whose only crop is the whole photograph."""
    config, size = plan.config, plan.sizes.guidance
    image, keys = encoder_pixels(batch["image"], config.dataset), others.photograph_keys(batch["crops"], config.seed)
    if isinstance(model, FeatUp):
        assert encoder is not None, "models.settings refuses timm models"
        return others.featup(model, image, size, lambda x: encoder(encoder.normalize(x)), keys)
    lr, hr = lax.stop_gradient(low_and_high(plan, encoder, batch))
    if isinstance(model, JAFAR):
        return others.jafar(model, image, size, lr, hr[:, 0], keys)
    return others.naf(model, image, size, lr, hr[:, 0], jax.random.fold_in(jax.random.key(config.seed), step))


def updated(
    config: Config, state: TrainState, gradients: Any, norm: Float[Array, ""], metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """Return the state after a step of the optimizer and of the average, and the metrics.

    The state stays as it is unless loss and gradient norm are finite, in this step and in all before it.
    """
    rate = optim.schedule(config.optimizer, config.max_steps)(state.step)
    params, moments = optim.update(config.optimizer, rate, gradients, norm, state.optimizer, state.params)
    ema = state.ema
    if ema is not None:
        ema = optim.average(config.optimizer.ema_decay, ema, params, state.step)
    ok = state.ok & jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    moved = TrainState(state.step + 1, params, state.unused, moments, ema, ok)
    kept = dataclasses.replace(state, ok=ok)
    state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), moved, kept)
    return state, metrics | dict(gradient_norm=norm, learning_rate=jnp.asarray(rate, jnp.float32), ok=ok)


def resized(image: Float[Array, "B H W C"], size: Size, antialias: bool = True) -> Float[Array, "B h w C"]:
    """Return images at another size, bilinear."""
    return jax.image.resize(image, (len(image), *size, image.shape[-1]), "bilinear", antialias=antialias)


def guidance(image: Shaped[Array, "B H W C"], size: Size, data: DatasetConfig) -> Float[Array, "B h w C"]:
    """Return photographs, normalised as ImageNet, or images of bands, each with its own mean and deviation."""
    mean, std = (jnp.asarray(x, jnp.float32) for x in ((data.mean, data.std) if data.encoder_bands else IMAGENET))
    pixels = image if data.encoder_bands else image.astype(jnp.float32) / 255
    return (resized(pixels, size) - mean) / std


def encoder_pixels(image: Shaped[Array, "*B H W C"], data: DatasetConfig) -> Float[Array, "*B H W 3"]:
    """Return what an encoder sees, in [0, 1]: photographs, or three bands between their limits."""
    if data.encoder_bands is None:
        return image.astype(jnp.float32) / 255
    bands = jnp.array(data.encoder_bands)
    low, high = (jnp.asarray(limit, jnp.float32)[bands] for limit in data.limits())
    return jnp.clip((image[..., bands] - low) / (high - low), 0, 1)


def encoder_views(
    batch: Batch, sizes: StepSizes, data: DatasetConfig
) -> tuple[Float[Array, "B H W 3"], Float[Array, "N Hc Wc 3"]]:
    """Return what an encoder sees, in [0, 1]: the whole photographs, and their crops one after the other."""
    crops = cut_crops(batch["image"], sizes.corners(batch["crops"]) * sizes.patch, sizes.view)
    whole = resized(encoder_pixels(batch["image"], data), sizes.whole, sizes.antialias)
    return whole, encoder_pixels(rearrange(crops, "b n h w c -> (b n) h w c"), data)


def features_of(
    encoder: FrozenEncoder, views: tuple[Float[Array, "B H W 3"], Float[Array, "N Hc Wc 3"]]
) -> tuple[Float[Array, "B h w C"], Float[Array, "B n hc wc C"]]:
    """Return an encoder's features of the whole photographs and of their crops, given what `encoder_views` returns."""
    whole, crops = (encoder(encoder.normalize(view)) for view in views)
    return whole, rearrange(crops, "(b n) h w c -> b n h w c", b=len(whole))


def draw_channels(config: FeaturesConfig, share: float, channels: int, key: PRNGKeyArray) -> Int[Array, " kept"] | None:
    """Return the channels a step works on, in their order; None if it takes all of them as they are."""
    kept = max(1, round(share * channels))
    if kept == channels and not config.shuffle:
        return None
    drawn = jax.random.permutation(key, channels)[:kept]
    return drawn if config.shuffle else drawn.sort()


def in_parts(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """Return the mean of a function over equal parts of a batch, computed one after the other to save memory."""
    if parts == 1:
        return function(batch)
    pieces = jax.tree.map(lambda x: rearrange(x, "(parts b) ... -> parts b ...", parts=parts), batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = lax.scan(lambda sums, piece: (jax.tree.map(jnp.add, sums, function(piece)), None), zeros, pieces)
    return jax.tree.map(lambda x: x / parts, sums)


def reduce(gradients: Any, specs: Any, mesh: Mesh) -> tuple[Any, Float[Array, ""]]:
    """Average gradients over all devices, within `shard_map`, and return them with the norm of the whole gradient.

    The gradient of a sharded parameter comes already summed over the axis `model`; each device holds its shard.
    """

    def mean(x, spec):
        return lax.psum(x, sharding.AXES if sharding.sharded_axis(spec) is None else "data") / mesh.size

    gradients = jax.tree.map(mean, gradients, specs)
    squares = {True: jnp.zeros(()), False: jnp.zeros(())}
    for x, spec in zip(jax.tree.leaves(gradients), jax.tree.leaves(specs)):
        squares[sharding.sharded_axis(spec) is not None] += jnp.square(x).sum()
    spread = lax.psum(squares[True], "model") if mesh.shape["model"] > 1 else squares[True]
    return gradients, jnp.sqrt(squares[False] + spread)
