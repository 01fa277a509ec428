"""FeatUp's stack of joint bilateral upsamplers (arXiv 2403.10516) in Flax nnx: four times twice the size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from anyup_core import geometry
from anyup_core.upsamplers.featup import FIXUP, KEY_DIM, RADIUS, STAGES, TAPS, FeatUpConfig, doubled, slabs
from anyup_jax.layers import Conv
from anyup_jax.pooling import adaptive_average_pool
from anyup_jax.row_shards import Size
from anyup_jax.upsamplers.interpolation import resize
from anyup_jax.upsamplers.protocol import ConfiguredUpsampler

SIDE, BORDER = 2 * RADIUS + 1, 2 * RADIUS
TILE = 8  # side of a tile of output positions
POSITIONS = 4096  # output positions worked on at once


class Projection(nnx.Module):
    """Two 1 x 1 convolutions with GELU between them."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = Conv(inputs, outputs, use_bias=True, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(outputs, outputs, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W inputs"]) -> Float[Array, "B H W outputs"]:
        return self.conv2(jax.nn.gelu(self.conv1(x), approximate=False))


class Stage(nnx.Module):
    """Joint bilateral upsampling to twice the size, with a learned range and a correction of the kernels."""

    def __init__(self, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.range_temp = nnx.Param(jnp.zeros((), jnp.float32))
        self.sigma_spatial = nnx.Param(jnp.ones((), jnp.float32))
        self.range_proj = Projection(3, KEY_DIM, dtype=dtype, rngs=rngs)
        self.fixup_proj = Projection(TAPS + 3, TAPS, dtype=dtype, rngs=rngs)

    def __call__(
        self, source: Float[Array, "B h w C"], image: Float[Array, "B H W 3"], q_chunk_size: int | None
    ) -> Float[Array, "B 2*h 2*w C"]:
        size = 2 * source.shape[1], 2 * source.shape[2]
        guide = adaptive_average_pool(image, size)
        key = self.range_proj(guide)
        around, (rows, cols) = reflect(key), (doubled(n) for n in source.shape[1:3])

        def kernels(at):
            return self.kernels(at.of(around, BORDER), at.of(key), at.of(guide))

        return apply_kernels(kernels, source, size, rows, cols, SIDE, q_chunk_size)

    def kernels(
        self, around: Float[Array, "B Yp Xp D"], key: Float[Array, "B Y X D"], guide: Float[Array, "B Y X 3"]
    ) -> Float[Array, "B Y X 49"]:
        """Return the weight of each tap; `around` are the keys with a border of 3."""
        temperature = jnp.clip(jnp.exp(self.range_temp[...]), 1e-4, 1e4)
        logits = correlate(around, key, SIDE).astype(jnp.float32)
        axis = np.square(np.linspace(-1, 1, SIDE, dtype=np.float32))
        distance = jnp.asarray((axis[:, None] + axis).ravel())
        spatial = jnp.exp(-distance / (2 * jnp.square(self.sigma_spatial[...])))
        kernels = jax.nn.softmax(temperature * logits, -1) * spatial
        kernels = kernels / jnp.maximum(kernels.sum(-1, keepdims=True), 1e-7)
        return kernels + FIXUP * self.fixup_proj(jnp.concatenate([kernels, guide.astype(kernels.dtype)], -1))


class FeatUp(ConfiguredUpsampler):
    """FeatUp's joint bilateral upsampler: the output is 16 times the features' size, whatever the image's.

    Args:
        config: the settings; the default ones if None.
        rngs: random streams for the initial parameters.
        dtype: type of the convolutions; parameters are float32 either way.
        fields: fields of `FeatUpConfig` that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings = FeatUpConfig

    def __init__(
        self, config: FeatUpConfig | None = None, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, **fields: Any
    ):
        super().__init__(config, dtype, **fields)
        settings = self.config
        channels = settings.channels
        norm = functools.partial(nnx.LayerNorm, channels, epsilon=1e-5, use_fast_variance=False)
        self.norm = norm(rngs=rngs) if settings.channel_norm else None
        for stage in range(1, STAGES + 1):
            setattr(self, f"up{stage}", Stage(dtype=dtype, rngs=rngs))
        self.fixup_proj = Conv(channels, channels, use_bias=True, dtype=dtype, rngs=rngs)

    def upsample(
        self, image: Float[Array, "B H W 3"], features: Float[Array, "B h w C"], size: Size, q_chunk_size: int | None
    ) -> Float[Array, "B Ho Wo C"]:
        x = features.astype(jnp.promote_types(features.dtype, self.dtype))
        if self.norm is not None:
            x = self.norm(x)
        # the published model ends with x + 0.1 (W x + b). A stage treats all channels alike, so that W may go before it
        x = x + FIXUP * (self.fixup_proj(x) - self.fixup_proj.bias[...])
        for stage in range(1, STAGES + 1):
            x = getattr(self, f"up{stage}")(x, image, q_chunk_size)
        return resize(x, size, "bilinear") + (FIXUP * self.fixup_proj.bias[...]).astype(x.dtype)


def reflect(x: Float[Array, "B H W C"]) -> Float[Array, "B Hp Wp C"]:
    """Add a border of 3 reflected positions."""
    for axis in (1, 2):
        x = jnp.take(x, geometry.reflection(x.shape[axis], RADIUS), axis)
    return x


def adaptive_conv(
    padded: Float[Array, "B Yp Xp C"], filters: Float[Array, "B Y X k k"], q_chunk_size: int | None = None
) -> Float[Array, "B Y X C"]:
    """Correlate every position with a kernel of its own, shared by the channels: FeatUp's compiled operation.

    out[b, y, x, c] = sum over i and j of filters[b, y, x, i, j] padded[b, y + i, x + j, c]. Its gradients are the true
    ones; the published CUDA kernel gives the filters a gradient at the flat taps 0, 1, 4, 9, 16, 25 and 36 only.

    Args:
        padded: the map with a border of k - 1 rows and columns in all.
        filters: a kernel for each output position.
        q_chunk_size: output positions worked on at once; bounds memory, never changes the result.

    Raises ValueError for shapes that do not fit.
    """
    batch, height, width, side, _ = filters.shape
    if padded.shape[:3] != (batch, height + side - 1, width + side - 1) or filters.shape[4] != side:
        raise ValueError(
            f"padded {padded.shape} must be {side - 1} rows and columns larger than filters {filters.shape}, whose "
            "kernels must be square."
        )
    flat = filters.reshape(*filters.shape[:3], side**2)
    rows, cols = (np.eye(n, dtype=np.float32) for n in padded.shape[1:3])
    return apply_kernels(lambda at: at.of(flat), padded, (height, width), rows, cols, side, q_chunk_size)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A row of tiles: a rectangle of output positions, from `first` on; what lies beyond the edge repeats it."""

    first: tuple[Int[Array, ""], Int[Array, ""]]
    size: Size

    def of(self, x: Float[Array, "B H W C"], border: int = 0) -> Float[Array, "B Y X C"]:
        """Cut the rectangle out of a map that has `border` rows and columns more."""
        for axis, first, count in zip((1, 2), self.first, self.size):
            x = jnp.take(x, first + jnp.arange(count + border), axis, mode="clip")
        return x


def apply_kernels(
    kernels: Callable[[Piece], Float[Array, "B Y X taps"]],
    source: Float[Array, "B h w C"],
    size: Size,
    rows: Float[np.ndarray, "Yp h"],
    cols: Float[np.ndarray, "Xp w"],
    side: int,
    q_chunk_size: int | None,
) -> Float[Array, "B Y X C"]:
    """Correlate a map, interpolated first, with a kernel for each position: products of matrices, tile by tile.

    The kernels of a tile see one slab of the interpolated map, and this is a product of the source's cells with the
    weights in `rows` and `cols`. So the kernels are multiplied by these weights, and the result by the cells: the
    interpolated map does not exist. Nothing is kept for the gradient but the inputs.

    Args:
        kernels: returns those of a piece of the output.
        source: the map.
        size: height and width of the output.
        rows, cols: weights of the cells in each position of the interpolated map, with its border.
        side: of the kernels.
        q_chunk_size: output positions worked on at once.
    """
    positions = q_chunk_size or POSITIONS
    tile = max(1, min(TILE, int(positions**0.5)))
    (top, tall), (left, wide) = (slabs(table, n, tile, side) for table, n in zip((rows, cols), size))
    group = max(1, min(len(left), positions // tile**2))
    left, wide = (np.concatenate([x, np.repeat(x[-1:], -len(x) % group, 0)]) for x in (left, wide))
    across = len(left) // group

    @jax.checkpoint
    def compute(index):
        row, first = index // across, index % across * group
        begin, weights = (lax.dynamic_slice_in_dim(jnp.asarray(x), first, group) for x in (left, wide))
        strip = lax.dynamic_slice_in_dim(source, jnp.asarray(top)[row], tall.shape[2], 1)
        cells = jnp.take(strip, begin[:, None] + jnp.arange(wide.shape[2]), 2)
        spread = kernels(Piece((row * tile, first * tile), (tile, group * tile)))
        spread = rearrange(spread, "b y (n x) (i j) -> b n y x i j", n=group, i=side)
        spread = skew(skew(spread, 3, 5), 2, 4)
        spread = jnp.einsum("bnyxuv,ur->bnyxvr", spread, jnp.asarray(tall)[row], precision="highest")
        spread = jnp.einsum("bnyxvr,nvs->bnyxrs", spread, weights, precision="highest").astype(source.dtype)
        output = jnp.einsum("bnyxrs,brnsc->bynxc", spread, cells, precision="highest")
        return rearrange(output, "b y n x c -> b y (n x) c")

    pieces = lax.map(compute, jnp.arange(len(top) * across, dtype=jnp.int32))
    whole = rearrange(pieces, "(r c) b y x e -> b (r y) (c x) e", c=across)
    return whole[:, : size[0], : size[1]]


def correlate(padded: Float[Array, "B Yp Xp D"], key: Float[Array, "B Y X D"], side: int) -> Float[Array, "B Y X taps"]:
    """Return the products of every position's key with those around it, row by row."""
    tile = TILE if key.shape[2] % TILE == 0 else key.shape[2]
    key = rearrange(key, "b y (n x) d -> b n y x d", x=tile)
    columns = np.arange(key.shape[1])[:, None] * tile + np.arange(tile + side - 1)
    spread = jnp.einsum("bnyxd,bunvd->bnyxuv", key, jnp.take(padded, columns, 2), precision="highest")
    return rearrange(unskew(unskew(spread, 3, 5), 2, 4), "b n y x i j -> b y (n x) (i j)")


def skew(x: Float[Array, "..."], axis: int, along: int) -> Float[Array, "..."]:
    """Shift entry number i of an axis by i positions along a later one, which grows; zeros come in.

    With one more zero at its end every row is read one position later than the one before.
    """
    rows, taps = x.shape[axis], x.shape[along]
    x = jnp.moveaxis(x, (axis, along), (-2, -1))
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows)]).reshape(*x.shape[:-2], -1)
    x = x[..., : rows * (taps + rows - 1)].reshape(*x.shape[:-1], rows, taps + rows - 1)
    return jnp.moveaxis(x, (-2, -1), (axis, along))


def unskew(x: Float[Array, "..."], axis: int, along: int) -> Float[Array, "..."]:
    """Take back what `skew` did."""
    rows, width = x.shape[axis], x.shape[along]
    x = jnp.moveaxis(x, (axis, along), (-2, -1))
    x = jnp.pad(x.reshape(*x.shape[:-2], -1), [(0, 0)] * (x.ndim - 2) + [(0, rows)])
    x = x.reshape(*x.shape[:-1], rows, width + 1)[..., : width + 1 - rows]
    return jnp.moveaxis(x, (-2, -1), (axis, along))
