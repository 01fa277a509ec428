"""Heads that predict depth and surface normals from frozen features, as in Probe3D (El Banani et al., 2024).

A head's output becomes depth or normals at the size of the target: depth is interpolated bilinearly after the bins are
averaged, the raw normals bicubically before they are scaled to unit length. The published heads upsample low-resolution
features; features that are upsampled already need no more, so the caller gives the size of the output.

Parameters are float32; `dtype` is the type of the computation. The outputs are float32 for every `dtype`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_jax.layers import convolve, uniform
from evaluation.config import LEVELS, Size
from evaluation.methods import axis_weights

BINS, NEAR, FAR = 256, 1e-3, 10.0  # the depths that a pixel chooses among, in metres
FLOOR = 0.1  # added to the weight of every bin
LEAST_KAPPA = 0.01
DEPTH_OUTPUTS, NORMAL_OUTPUTS = BINS, 4

Maps = Float[Array, "B h w _"] | Sequence[Float[Array, "B h w _"]]


class Linear(nnx.Module):
    """Bilinear upsampling, then one 3 x 3 convolution, zeros around the image.

    Args:
        channels: of the features; of several maps, the sum or one number for each.
        outputs: `DEPTH_OUTPUTS` or `NORMAL_OUTPUTS`.
        dtype: type of the computation.
        rngs: for the initial weights.
    """

    def __init__(self, channels: int | Sequence[int], outputs: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.conv = Conv(int(np.sum(channels)), outputs, 3, dtype=dtype, rngs=rngs)

    def __call__(self, features: Maps, size: Size | None = None) -> Float[Array, "B Ho Wo outputs"]:
        """Return the raw prediction.

        Args:
            features: one map, or the maps of several layers, all of one size, which are concatenated.
            size: height and width of the output; None for four times those of the features, as published. Features of
                this size are not resized.
        """
        joined = jnp.concatenate(_listed(features), -1)
        height, width = joined.shape[1:3]
        return self.conv(resize(joined, size or (4 * height, 4 * width), "bilinear")).astype(jnp.float32)


class DPT(nnx.Module):
    """Four maps, fused from the last to the first by residual convolutions, then two convolutions.

    Every map passes a 1 x 1 convolution to `hidden` channels and is upsampled to twice its size; the fused map is
    upsampled four times before the last convolutions, and the output twice after them (Ranftl et al., 2021, as in
    Probe3D: no normalisation, nearest upsampling throughout).

    Args:
        channels: of the features, one number for all four maps or one for each.
        outputs: `DEPTH_OUTPUTS` or `NORMAL_OUTPUTS`.
        hidden: channels between the first and the last convolution.
        dtype: type of the computation.
        rngs: for the initial weights.
    """

    def __init__(
        self,
        channels: int | Sequence[int],
        outputs: int,
        *,
        hidden: int = 512,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = dict(dtype=dtype, rngs=rngs)
        self.project = nnx.List([Conv(n, hidden, 1, **options) for n in np.broadcast_to(channels, LEVELS).tolist()])
        self.fuse = nnx.List([Fusion(hidden, last=level == LEVELS - 1, **options) for level in range(LEVELS)])
        self.conv1 = Conv(hidden, hidden, 3, **options)
        self.conv2 = Conv(hidden, outputs, 3, **options)

    def __call__(self, features: Maps, size: Size | None = None) -> Float[Array, "B Ho Wo outputs"]:
        """Return the raw prediction.

        Args:
            features: four maps of one size, from the first layer to the last, or one that is used four times.
            size: height and width of the output; None for 16 times those of the features, as published. No stage
                exceeds it and the last one reaches it: features of this size are not resized, and 16 times the size of
                the features is the same as None.

        Raises:
            ValueError: for any other number of maps.
        """
        maps = _listed(features)
        maps = maps * LEVELS if len(maps) == 1 else maps
        if len(maps) != LEVELS:
            raise ValueError(f"The DPT head takes 1 or {LEVELS} feature maps, got {len(maps)}.")
        cells = maps[0].shape[1:3]
        first, second, third = (tuple(times * n for n in cells) for times in (2, 8, 16))
        if size is not None:
            first, second, third = _at_most(first, size), _at_most(second, size), size

        maps = [resize(project(x), first, "nearest") for project, x in zip(self.project, maps)]
        fused = None
        for fuse, x in reversed(list(zip(self.fuse, maps))):
            fused = fuse(x, fused)
        x = self.conv2(jax.nn.relu(self.conv1(resize(fused, second, "nearest"))))
        return resize(x, third, "nearest").astype(jnp.float32)


def _listed(features: Maps) -> list[Float[Array, "B h w _"]]:
    return list(features) if isinstance(features, Sequence) else [features]


def _at_most(size: Size, limit: Size) -> Size:
    return min(size[0], limit[0]), min(size[1], limit[1])


class Fusion(nnx.Module):
    """Two residual blocks; the result of the later levels is added between them. The last level has only the second."""

    def __init__(self, channels: int, *, last: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.block1 = None if last else Residual(channels, dtype=dtype, rngs=rngs)
        self.block2 = Residual(channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W channels"], later: Float[Array, "B H W channels"] | None
    ) -> Float[Array, "B H W channels"]:
        return self.block2(x if self.block1 is None else self.block1(x) + later)


class Residual(nnx.Module):
    """x + ReLU(conv(ReLU(conv(x)))), both convolutions 3 x 3."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = Conv(channels, channels, 3, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W channels"]) -> Float[Array, "B H W channels"]:
        return x + jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))


class Conv(nnx.Module):
    """k x k convolution with a bias, zeros around the image, initialised as PyTorch does. Kernel (k, k, in, out)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        bound = (inputs * kernel_size**2) ** -0.5
        self.kernel = nnx.Param(uniform(rngs, (kernel_size, kernel_size, inputs, outputs), bound))
        self.bias = nnx.Param(uniform(rngs, (outputs,), bound))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B H W inputs"]) -> Float[Array, "B H W outputs"]:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        half = kernel.shape[0] // 2
        return convolve(x.astype(self.dtype), kernel, ((half, half), (half, half))) + bias


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


def resize(x: Float[Array, "B H W C"], size: Size, kernel: str) -> Float[Array, "B Ho Wo C"]:
    """Interpolate as PyTorch does without aligned corners and antialiasing; the map itself where the size is its own.

    Args:
        x: the map.
        size: height and width of the result.
        kernel: "nearest", "bilinear" or "bicubic", see `evaluation.methods.axis_weights`.
    """
    if x.shape[1:3] == tuple(size):
        return x
    rows, cols = (jnp.asarray(axis_weights(kernel, n, m), x.dtype) for n, m in zip(x.shape[1:3], size))
    return jnp.einsum("Hh,bhwc,Ww->bHWc", rows, x, cols, precision=lax.Precision.HIGHEST)
