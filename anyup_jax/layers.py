"""The layers of AnyUp in Flax nnx, NHWC, in the order of `anyup_torch/layers.py`.

Parameters are float32. `dtype` is the type of the convolutions and activations; norm statistics, rotary angles and
softmax stay in float32 whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce, repeat
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core import geometry
from anyup_core.config import NORM_GROUPS
from anyup_jax.blocked import convolve, map_rows, precision, rotate
from anyup_jax.row_shards import ALL_ROWS, Rows

GROUP_NORM_EPS = 1e-5
RMS_NORM_EPS = float(np.finfo(np.float32).eps)


class Unused(nnx.Variable):
    """A published weight that never reaches the output: kept for conversion without loss, never trained."""


@jax.custom_jvp
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / (1 + exp(-x)): `jax.nn.silu` with one operation less, which counts where memory is not the limit."""
    return x / (1 + jnp.exp(-x))


@silu.defjvp
def _silu_jvp(primals, tangents):
    sigmoid = jax.nn.sigmoid(*primals)  # finite where exp(-x) is not
    return silu(*primals), tangents[0] * (sigmoid + primals[0] * sigmoid * (1 - sigmoid))


def normed_silu(x: Float[Array, "B H W C"], affine: tuple[Float[Array, "B 1 1 C"], ...]) -> Float[Array, "B H W C"]:
    """SiLU of a norm's output, given the norm's scale and shift."""
    scale, shift = affine
    return silu(x * scale + shift).astype(x.dtype)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> Float[Array, "..."]:
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


class Conv(nnx.Module):
    """k x k convolution, without bias by default; `padding` is "reflect" or "zeros". Kernel (k, k, in, out)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int = 1,
        *,
        padding: str = "reflect",
        use_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape, bound = (kernel_size, kernel_size, inputs, outputs), (inputs * kernel_size**2) ** -0.5
        self.kernel = nnx.Param(uniform(rngs, shape, bound))
        self.bias: Any = nnx.Param(uniform(rngs, (outputs,), bound)) if use_bias else None
        self.padding = padding
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B _ W inputs"], rows: Rows = ALL_ROWS) -> Float[Array, "B _ W outputs"]:
        kernel, x = self.kernel[...].astype(self.dtype), x.astype(self.dtype)
        half, edges = kernel.shape[0] // 2, ((0, 0), (0, 0))
        if half and self.padding == "reflect":
            x = jnp.take(rows.reflect(x, half), geometry.reflection(x.shape[2], half), 2)
        elif half:
            x, zero_rows = rows.pad(x, half)
            edges = (zero_rows, (half, half))
        y: Array = convolve(x, kernel, edges)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Normalisation over the positions and the channels of each of 8 groups, then a scale and a shift per channel."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def affine(
        self, x: Float[Array, "B H W channels"], rows: Rows = ALL_ROWS
    ) -> tuple[Float[Array, "B 1 1 channels"], ...]:
        """Return the scale and shift per image and channel that normalise `x`."""
        return group_affine(x, self.scale[...], self.bias[...], rows)


def group_affine(
    x: Float[Array, "B H W channels"],
    scale: Float[Array, " channels"] | float = 1.0,
    bias: Float[Array, " channels"] | float = 0.0,
    rows: Rows = ALL_ROWS,
) -> tuple[Float[Array, "B 1 1 channels"], ...]:
    """Return scale and shift of a GroupNorm of `x`, per image and channel: two reductions and no copy of x."""
    x = x.astype(jnp.float32)
    moments = rows.mean(jnp.stack([x.mean((1, 2)), jnp.square(x).mean((1, 2))]))
    grouped = reduce(moments, "moment b (group c) -> moment b group", "mean", group=NORM_GROUPS)
    mean, square = repeat(grouped, "moment b group -> moment b (group c)", c=x.shape[-1] // NORM_GROUPS)
    scale = scale * lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + GROUP_NORM_EPS)
    return scale[:, None, None], (bias - mean * scale)[:, None, None]


Pooled = Any  # averages over a grid of cells, (B, h, w, D), or a dictionary of several
Pool = Callable[[Float[Array, "B H W D"]], Pooled]


class ResBlock(nnx.Module):
    """`conv(SiLU(GN(conv(SiLU(GN(x))))))` plus the shortcut, both convolutions 1 x 1."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs)
        self.conv1 = Conv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(outputs)
        self.conv2 = Conv(outputs, outputs, dtype=dtype, rngs=rngs)
        self.shortcut = Conv(inputs, outputs, dtype=dtype, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: Float[Array, "B H W inputs"], pool: Pool | None = None, rows: Rows = ALL_ROWS) -> Pooled:
        """Apply the block, then average the result over cells with `pool` (None: every position, (B, H, W, outputs)).

        Everything after the second SiLU is linear in the positions, so averaging comes before the last convolution.
        Where `pool` returns a dictionary of averages, so does this method.
        """
        return self.with_buffer(x, pool, rows)[0]

    def with_buffer(
        self,
        x: Float[Array, "B H W inputs"],
        pool: Pool | None = None,
        rows: Rows = ALL_ROWS,
        buffer: Float[Array, "B H W _"] | None = None,
    ) -> tuple[Pooled, Float[Array, "B H W outputs"]]:
        """Do the same with a buffer, as `map_rows` has it, and return one that the next layer may have.

        `x` is read again for the shortcut, so that XLA copies a map for every block that has none.
        """
        shortcut = self.shortcut or (lambda x: x)
        norm1 = self.norm1.affine(x, rows)
        hidden = map_rows(lambda x: self.conv1(normed_silu(x, norm1)), x, buffer=buffer)
        norm2 = self.norm2.affine(hidden, rows)
        if pool is None:
            return map_rows(lambda x, hidden: shortcut(x) + self.conv2(normed_silu(hidden, norm2)), x, hidden), hidden
        hidden = map_rows(lambda hidden: normed_silu(hidden, norm2), hidden)
        joined = jax.tree.map(lambda x, hidden: shortcut(x) + self.conv2(hidden), pool(x), pool(hidden))
        return joined, hidden


class ConvEncoder(nnx.Module):
    """A k x k convolution with reflected borders and two ResBlocks; its methods are those of a ResBlock."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, kernel_size, dtype=dtype, rngs=rngs)
        self.block1 = ResBlock(outputs, outputs, dtype=dtype, rngs=rngs)
        self.block2 = ResBlock(outputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W inputs"], pool: Pool | None = None, rows: Rows = ALL_ROWS) -> Pooled:
        return self.with_buffer(x, pool, rows)[0]

    def with_buffer(
        self,
        x: Float[Array, "B H W inputs"],
        pool: Pool | None = None,
        rows: Rows = ALL_ROWS,
        buffer: Float[Array, "B H W _"] | None = None,
    ) -> tuple[Pooled, Float[Array, "B H W outputs"]]:
        x, buffer = self.block1.with_buffer(self.conv(x, rows), None, rows, buffer)
        return self.block2.with_buffer(x, pool, rows, buffer)


class FeatureUnification(nnx.Module):
    """Describes features of any number of channels by how strongly, on average, they answer to M filters.

    Every channel is correlated with every filter (zero padding, divided by the taps inside the image), a softmax picks
    among the filters, and the picks are averaged over the channels.

    The published layer writes its responses channel by channel (entry c M + m of a buffer) but reads the same buffer as
    if filter by filter (entry m' C + c'). The released weights were trained that way, so it is kept: the softmax runs
    over m' for a fixed c', and the layer is not invariant to the order of the channels.
    """

    def __init__(
        self, filters: int, kernel_size: int, init_gaussian_derivatives: bool, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        if init_gaussian_derivatives:
            self.basis = nnx.Param(jnp.asarray(geometry.gaussian_derivatives(filters, kernel_size)))
        else:
            self.basis = nnx.Param(jax.random.normal(rngs.params(), (filters, kernel_size, kernel_size), jnp.float32))
        self.dtype = dtype

    def __call__(self, features: Float[Array, "B h w C"]) -> Float[Array, "B h w M"]:
        basis = self.basis[...]
        (filters, kernel, _), (batch, height, width, channels) = basis.shape, features.shape
        half = kernel // 2
        padded = jnp.pad(features, ((0, 0), (half, half), (half, half), (0, 0)))
        rows, cols = (geometry.taps_in_bounds(size, kernel) for size in (height, width))
        shares = jnp.asarray(1 / np.outer(rows, cols), jnp.float32)
        taps = basis.reshape(filters, -1).T.astype(self.dtype)

        @jax.checkpoint
        def describe(start):  # positions start ... start + step of the flattened batch x height x width
            index = jnp.minimum(start + jnp.arange(step), batch * height * width - 1)
            b, i, j = index // (height * width), index // width % height, index % width
            offsets = np.arange(kernel)
            patch = padded[b[:, None, None], i[:, None, None] + offsets[:, None], j[:, None, None] + offsets]
            patch = patch.reshape(step, kernel * kernel, channels).swapaxes(1, 2)
            response = jnp.matmul(patch.astype(self.dtype), taps, precision=precision(self.dtype)).astype(jnp.float32)
            response = response * shares[i, j][:, None, None]
            misread = response.reshape(step, filters, channels)  # written (C, M), read (M, C): the quirk
            even = 1 / filters  # picks are close to it: sums of differences round less, and what follows magnifies them
            return (jax.nn.softmax(misread, axis=1) - even).mean(2) + even

        assumed = channels if isinstance(channels, int) else UNIFICATION_CHANNELS
        step = max(1, min(batch * height * width, UNIFICATION_BLOCK // (assumed * filters)))
        starts = jnp.arange(0, batch * height * width, step)
        unified = lax.map(describe, starts).reshape(-1, filters)[: batch * height * width]
        return unified.reshape(batch, height, width, filters)


UNIFICATION_BLOCK = 1 << 20  # responses held at once by the feature unification
UNIFICATION_CHANNELS = 1024  # of features, in a program for any number of channels, for the number of positions at once


class RoPE(nnx.Module):
    """Rotates every pixel's channels by angles that are linear in its coordinates, with trained frequencies."""

    def __init__(self, dim: int):
        self.freqs = nnx.Param(jnp.asarray(geometry.rope_frequencies(dim)))

    def __call__(self, x: Float[Array, "B H W D"], rows: Rows = ALL_ROWS) -> Float[Array, "B H W D"]:
        return rotate(x, self.freqs[...], *map(jnp.asarray, rows.coordinates(*x.shape[1:3])))


class RMSNorm(nnx.Module):
    """Division by the root mean square over the channels, then a scale."""

    def __init__(self, channels: int, variable: type[nnx.Variable] = nnx.Param):
        self.scale = variable(jnp.ones(channels, jnp.float32))

    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + RMS_NORM_EPS)
        return (normed * self.scale[...]).astype(x.dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`."""

    def __init__(
        self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs, variable: type[nnx.Variable] = nnx.Param
    ):
        self.kernel = variable(uniform(rngs, (inputs, outputs), (6 / (inputs + outputs)) ** 0.5))
        self.bias = variable(jnp.zeros(outputs, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return jnp.matmul(x.astype(self.dtype), kernel, precision=precision(self.dtype)) + bias
