"""Heads that predict depth and normals from frozen features, and their losses, as in Probe3D (El Banani et al., 2024).

A head's output becomes depth or normals at the size of the target: depth is interpolated bilinearly after the bins are
averaged, the raw normals bicubically before they are scaled to unit length. The published heads upsample low-resolution
features; features that are upsampled already need no more, so the caller gives the size of the output.

Parameters are float32; `dtype` is the type of the computation. The outputs are float32 for every `dtype`.

Every mean of a loss is over the valid pixels of the whole batch. If there are none, the losses and their gradients are
0. Other pixels have no influence, whatever values they have, NaN included.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from anyup_jax import layers
from anyup_jax.upsamplers.interpolation import resize
from evaluation.config import LEVELS, Size

BINS, NEAR, FAR = 256, 1e-3, 10.0  # the depths that a pixel chooses among, in metres
FLOOR = 0.1  # added to the weight of every bin
LEAST_KAPPA = 0.01
OUTPUTS = dict(depth=BINS, normals=4)  # channels of the heads
SHIFT = 1e-3  # metres, added before logarithms
VARIANCE_FOCUS = 0.85
SCALE_INVARIANT_WEIGHT, GRADIENT_WEIGHT = 10.0, 0.5
STRIDES = 1, 2, 4, 6
STEP = 2  # pixels between the two that a gradient compares
COSINE_LIMIT = 1 - 1e-4

Map = Float[Array, "B H W channels"]
Conv = functools.partial(layers.Conv, padding="zeros", use_bias=True)


class Linear(nnx.Module):
    """Bilinear upsampling, then one 3 x 3 convolution, zeros around the image.

    Args:
        channels: of each map.
        outputs: channels of the output, of `OUTPUTS`.
        dtype: type of the computation.
        rngs: for the initial weights.
    """

    def __init__(self, channels: Sequence[int], outputs: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.conv = Conv(sum(channels), outputs, 3, dtype=dtype, rngs=rngs)

    def __call__(self, features: Sequence[Float[Array, "B h w _"]], size: Size) -> Float[Array, "B Ho Wo outputs"]:
        """Return the raw prediction.

        Args:
            features: the maps of one layer or of several, all of one size, which are concatenated.
            size: height and width of the output; published are four times those of the features. Features of this
                size are not resized.
        """
        return self.conv(resize(jnp.concatenate(features, -1), size, "bilinear")).astype(jnp.float32)


class DPT(nnx.Module):
    """Four maps, fused from the last to the first by residual convolutions, then two convolutions.

    Every map passes a 1 x 1 convolution to `hidden` channels and is upsampled to twice its size; the fused map is
    upsampled four times before the last convolutions, and the output twice after them (Ranftl et al., 2021, as in
    Probe3D: no normalisation, nearest upsampling throughout).

    Args:
        channels: of each of the four maps, or of the one that is used four times.
        outputs: channels of the output, of `OUTPUTS`.
        hidden: channels between the first and the last convolution.
        dtype: type of the computation.
        rngs: for the initial weights.
    """

    def __init__(
        self, channels: Sequence[int], outputs: int, *,
        hidden: int = 512, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        options = dict(dtype=dtype, rngs=rngs)
        self.project = nnx.List([Conv(n, hidden, 1, **options) for n in np.broadcast_to(channels, LEVELS).tolist()])
        self.fuse = nnx.List([Fusion(hidden, last=level == LEVELS - 1, **options) for level in range(LEVELS)])
        self.conv1 = Conv(hidden, hidden, 3, **options)
        self.conv2 = Conv(hidden, outputs, 3, **options)

    def __call__(self, features: Sequence[Float[Array, "B h w _"]], size: Size) -> Float[Array, "B Ho Wo outputs"]:
        """Return the raw prediction.

        Args:
            features: four maps of one size, from the first layer to the last, or one that is used four times.
            size: height and width of the output; published are 16 times those of the features. No stage exceeds it and
                the last one reaches it: features of this size are not resized.

        Raises:
            ValueError: for any other number of maps.
        """
        if len(features) not in (1, LEVELS):
            raise ValueError(f"The DPT head takes 1 or {LEVELS} feature maps, got {len(features)}.")
        first, second = (tuple(min(times * n, m) for n, m in zip(features[0].shape[1:3], size)) for times in (2, 8))
        fused = None
        for level in reversed(range(LEVELS)):
            x = resize(self.project[level](features[level % len(features)]), first, "nearest")
            fused = self.fuse[level](x, fused)
        x = self.conv2(jax.nn.relu(self.conv1(resize(fused, second, "nearest"))))
        return resize(x, size, "nearest").astype(jnp.float32)


class Fusion(nnx.Module):
    """Two residual blocks; the result of the later levels is added between them. The last level has only the second."""

    def __init__(self, channels: int, *, last: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.block1 = None if last else Residual(channels, dtype=dtype, rngs=rngs)
        self.block2 = Residual(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Map, later: Map | None) -> Map:
        return self.block2(x if self.block1 is None else self.block1(x) + later)


class Residual(nnx.Module):
    """x + ReLU(conv(ReLU(conv(x)))), both convolutions 3 x 3."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = Conv(channels, channels, 3, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        return x + jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))


def depth_of(logits: Float[Array, "B H W bins"], size: Size | None = None) -> Float[Array, "B Ho Wo"]:
    """Return the depth in metres that a head predicts, from 0.001 to 10.

    The mean of the bins' depths, uniform from 0.001 to 10, weighted by ReLU(logit) + 0.1 (after AdaBins, Bhat et al.,
    2021).

    Args:
        logits: one channel for each bin.
        size: height and width that the depth is resized to, bilinearly; None for those of the logits.
    """
    weights = jax.nn.relu(logits) + FLOOR
    bins = jnp.linspace(NEAR, FAR, logits.shape[-1])
    depth = jnp.matmul(weights, bins, precision=lax.Precision.HIGHEST) / weights.sum(-1)
    return resize(depth[..., None], size or depth.shape[1:3], "bilinear")[..., 0]


def normals_of(
    raw: Float[Array, "B H W 4"], size: Size | None = None
) -> tuple[Float[Array, "B Ho Wo 3"], Float[Array, "B Ho Wo"]]:
    """Return the unit normals that a head predicts, and how concentrated they are about the truth, kappa >= 0.01.

    Kappa is elu(x) + 1.01 of the fourth channel; the larger it is, the less uncertain is the normal (Bae et al., 2021).

    Args:
        raw: three channels of the normal, of any length, and one of the uncertainty.
        size: height and width that the raw channels are resized to, bicubically; None for their own.
    """
    raw = resize(raw, size or raw.shape[1:3], "bicubic")
    return unit(raw[..., :3]), jax.nn.elu(raw[..., 3]) + 1 + LEAST_KAPPA


def unit(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Scale vectors to length 1; those shorter than 1e-8 are divided by that, so that zero stays zero."""
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-16))


def depth_loss(
    prediction: Float[Array, "B H W"], target: Float[Array, "B H W"], valid: Bool[Array, "B H W"]
) -> Float[Array, ""]:
    """Return 10 sqrt(mean(g^2) - 0.85 mean(g)^2) + 0.5 L, with g = log(prediction + 0.001) - log(target + 0.001).

    L is the log-gradient loss (MegaDepth, Li & Snavely, 2018, as DINOv2 has it): of every 1st, 2nd, 4th and 6th row and
    column, the sum of |g(i) - g(i + 2)| along rows and along columns where both are valid, divided by the number of
    valid pixels there. Until November 2025 Probe3D's code took these differences and strides along the axes of batch
    and channels; here they run along rows and columns, as in its correction.

    Args:
        prediction, target: depth in metres, at least 0 where valid.
        valid: pixels that count; in the protocol those with 0 < target <= 10.
    """
    safe = (jnp.where(valid, depth, 1) for depth in (prediction, target))
    predicted, true = (jnp.log(depth + SHIFT) for depth in safe)
    g = predicted - true
    square = _mean(jnp.square(g), valid) - VARIANCE_FOCUS * jnp.square(_mean(g, valid))
    positive = square > 0  # the root has no gradient at 0, the value of a perfect prediction
    scale_invariant = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
    gradients = jnp.zeros(())
    for stride in STRIDES:
        level, mask = g[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        down = _absolute(level[:, :-STEP] - level[:, STEP:]) * (mask[:, :-STEP] & mask[:, STEP:])
        right = _absolute(level[:, :, :-STEP] - level[:, :, STEP:]) * (mask[:, :, :-STEP] & mask[:, :, STEP:])
        gradients += (down.sum() + right.sum()) / jnp.maximum(mask.sum(), 1)
    return SCALE_INVARIANT_WEIGHT * scale_invariant + GRADIENT_WEIGHT * gradients


def _absolute(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x * jnp.sign(x)  # its gradient at 0 is 0, that of jnp.abs is 1


def normal_loss(
    normals: Float[Array, "B H W 3"],
    kappa: Float[Array, "B H W"],
    target: Float[Array, "B H W 3"],
    valid: Bool[Array, "B H W"],
) -> Float[Array, ""]:
    """Return the mean of ln(1 + exp(-kappa pi)) - ln(kappa^2 + 1) + kappa theta, theta being the angle between normals.

    It is the negative log-likelihood of the angular von Mises-Fisher distribution (Bae et al., 2021) without its
    constant. As in Probe3D the cosine is clipped to +-(1 - 1e-4): within 0.81 degrees of the truth, and of its
    opposite, the loss does not depend on the direction.

    Args:
        normals: of unit length where valid, and `kappa` positive, as `normals_of` returns them.
        kappa: concentration.
        target: of any length; the angle to a zero vector counts as 90 degrees.
        valid: pixels that count.
    """
    normals, target = (jnp.where(valid[..., None], x, 0) for x in (normals, target))
    kappa = jnp.where(valid, kappa, 1)
    cosine = (normals * unit(target)).sum(-1)
    angle = jnp.arccos(jnp.clip(cosine, -COSINE_LIMIT, COSINE_LIMIT))
    return _mean(jax.nn.softplus(-kappa * jnp.pi) - jnp.log1p(jnp.square(kappa)) + kappa * angle, valid)


def _mean(x: Float[Array, "B H W"], valid: Bool[Array, "B H W"]) -> Float[Array, ""]:
    return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1)
