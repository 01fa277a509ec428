"""Outputs larger than memory: finished bands of rows, one after the other.

A GroupNorm needs the sums of a whole map, but between two norms every layer acts on single pixels. So the image is
passed through once for each norm in turn: the layers before the norm are computed again strip by strip, and only the
sums are kept. With all norms known, a strip's queries depend on nothing else, and a band of the output depends on its
own rows of queries and one more at either end. The recomputation takes longer than a plain call, more so where the
guide is too large to be held (`GUIDE`). The image, the keys and values, a strip and a band are held at the same time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from anyup_core import checks, geometry
from anyup_core.band_plan import Pieces, Plan, plan_bands
from anyup_core.checks import OutputSize
from anyup_core.config import NORM_GROUPS
from anyup_jax.blocked import BLOCK
from anyup_jax.image_code import ImageCode, native
from anyup_jax.layers import GROUP_NORM_EPS, ConvEncoder, GroupNorm, normed_silu
from anyup_jax.model import AnyUp, grid_of
from anyup_jax.pooling import adaptive_average_pool
from anyup_jax.promotion import standard_promotion
from anyup_jax.row_shards import CutRows

GUIDE = 1 << 29  # bytes of the guide up to which it is held, not computed again for every use

Affine = tuple[Float[Array, "B 1 1 D"], Float[Array, "B 1 1 D"]]


def upsample_bands(
    model: AnyUp,
    image: Float[Array | np.ndarray, "B H W input_dim"],
    features: Float[Array | np.ndarray, "B h w C"],
    output_size: OutputSize | None = None,
    q_chunk_size: int | None = None,
    values: Float[Array | np.ndarray, "B h w E"] | None = None,
    *,
    rows: int | None = None,
    dtype: DTypeLike | None = None,
) -> Iterator[Float[np.ndarray, "B rows Wo E"]]:
    """Yield the output of a plain call in bands of rows, from the top; the memory does not grow with Ho.

    The inputs are checked at once; work begins with the first band. Bands are read-only arrays on the host.

    Args:
        model, image, features, output_size, q_chunk_size, values: as for `AnyUp.__call__`.
        rows: rows of a band, the last one may have fewer; None for about 256 MB of float32. More rows repeat less work
            at the borders of bands.
        dtype: floating type of the bands, at most 32 bits wide; None for the type of the values.

    Raises:
        ValueError, TypeError: as for `AnyUp.__call__`, and for a number of rows or a type that does not fit.
    """
    size = checks.check_inputs(model.config, "NHWC", image, features, output_size, q_chunk_size, values)
    values = features if values is None else values
    dtype = jnp.dtype(jnp.asarray(native(values[:0])).dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4:
        raise TypeError(f"dtype={dtype} must be a floating type of at most 32 bits: float32, float16 or bfloat16.")
    channels = len(image) * max(values.shape[-1], model.config.qk_dim)
    plan = plan_bands(model.config, size, grid_of(features), channels, rows, q_chunk_size)
    image, features, values = native((image, features, values))
    return _bands(model, image, features, values, plan, dtype)


@dataclasses.dataclass(frozen=True)
class BandRows(CutRows):
    """The rows of the output in band number `first` of a plan."""

    plan: Plan

    def index(self):
        return self.first

    def windows(self, config, size, grid):
        return self.plan.windows(config.window_ratio, config.window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecomputedMaps:
    """The full-resolution maps of an image, which are never held: any strip of them is computed when it is needed.

    Attributes:
        image: the image, or, once `held`, the guide.
        affines: for each encoder the scales and shifts of its norms, in their order, as far as they are known.
        held: whether the guide takes the place of the image.
    """

    image: Float[Array, "B H W _"]
    affines: dict[str, tuple[Affine, ...]]
    held: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def strip_rows(self) -> int:
        """Rows of a strip: about a block of pixels, over the batch."""
        batch, height, width = self.image.shape[:3]
        return max(1, min(height, BLOCK // (batch * width)))

    def strip(self, model: AnyUp, name: str, first: Int[Array, ""], rows: int) -> Float[Array, "B rows W D"]:
        """Rows of the map that an encoder returns, or, where a norm is not known yet, of the map that it norms."""
        if name == "image_encoder":
            border = model.config.kernel_size // 2
            index = jnp.asarray(geometry.reflection(self.image.shape[1], border).astype(np.int32))
            index = lax.dynamic_slice_in_dim(index, first, rows + 2 * border)
            x = model.image_encoder.conv(jnp.take(self.image, index, 1), CutRows(first, self.image.shape[1]))
        else:
            x = getattr(model, name).conv(self.guide(model, first, rows))
        return advance(getattr(model, name), x, self.affines[name])

    def guide(self, model: AnyUp, first: Int[Array, ""], rows: int) -> Float[Array, "B rows W D"]:
        if self.held:
            return lax.dynamic_slice_in_dim(self.image, first, rows, 1)
        return model.rope(self.strip(model, "image_encoder", first, rows), CutRows(first, self.image.shape[1]))


def advance(encoder: ConvEncoder, x: Float[Array, "B H W D"], affines: tuple[Affine, ...]) -> Float[Array, "B H W D"]:
    """Apply an encoder's ResBlocks to the output of its convolution, up to the first norm that is not in `affines`."""
    for block, known in ((encoder.block1, affines[:2]), (encoder.block2, affines[2:])):
        if not known:
            return x
        hidden = block.conv1(normed_silu(x, known[0]))
        if len(known) == 1:
            return hidden
        x = x + block.conv2(normed_silu(hidden, known[1]))
    return x


def norms(encoder: ConvEncoder) -> tuple[GroupNorm, ...]:
    return encoder.block1.norm1, encoder.block1.norm2, encoder.block2.norm1, encoder.block2.norm2


def _bands(
    model: AnyUp, image, features, values, plan: Plan, dtype: np.dtype
) -> Iterator[Float[np.ndarray, "B rows Wo E"]]:
    features, values = jnp.asarray(features), jnp.asarray(values)
    maps = prepare(model, jnp.asarray(image, model.dtype))
    height, strip = maps.image.shape[1], maps.strip_rows

    pieces = Pieces(height, plan.cells[0], plan.cells[0], strip)
    key = describe(model, maps, features, *pieces.shares(0))
    pieces = Pieces(height, plan.size[0], plan.rows, strip, border=1)
    for band in range(plan.count):
        first = plan.first(band)
        output = finish(model, maps, key, values, *pieces.shares(first), np.int32(band), plan, dtype)
        yield np.asarray(output)[:, band * plan.rows - first :]


def prepare(model: AnyUp, image: Float[Array, "B H W input_dim"]) -> RecomputedMaps:
    """Pass through the image once for each norm; queries and keys share a pass."""
    dim, pixels = model.config.qk_dim, image.shape[0] * image.shape[1] * image.shape[2]
    held = pixels * dim * jnp.dtype(model.dtype).itemsize <= GUIDE
    maps = RecomputedMaps(image, {"image_encoder": (), "key_encoder": (), "query_encoder": ()})
    for names in (("image_encoder",), ("key_encoder", "query_encoder")):
        for number in range(4):
            sums = np.asarray(strip_sums(model, maps, names), np.float64).sum(0)
            affines = {
                name: (*maps.affines[name], affine(norms(getattr(model, name))[number], moments))
                for name, moments in zip(names, sums / (image.shape[1] * image.shape[2]))
            }
            maps = dataclasses.replace(maps, affines=maps.affines | affines)
        if held and not maps.held:
            maps = RecomputedMaps(hold_guide(model, maps), maps.affines, held=True)
    return maps


def affine(norm: GroupNorm, moments: Float[np.ndarray, "2 B D"]) -> Affine:
    """Return the scale and shift of a norm, given each channel's mean and mean square: `GroupNorm.affine`."""
    mean, square = moments.reshape(*moments.shape[:2], NORM_GROUPS, -1).mean(-1)
    spread = (np.maximum(square - mean**2, 0) + GROUP_NORM_EPS) ** -0.5
    scale, bias = (np.asarray(x[...], np.float64) for x in (norm.scale, norm.bias))
    mean, spread = (np.repeat(x, len(scale) // NORM_GROUPS, -1) for x in (mean, spread))
    scale = scale * spread
    scale, shift = (jnp.asarray(x[:, None, None], jnp.float32) for x in (scale, bias - mean * scale))
    return scale, shift


@functools.partial(jax.jit, static_argnames=("names",))
@standard_promotion()
def strip_sums(model: AnyUp, maps: RecomputedMaps, names: tuple[str, ...]) -> Float[Array, "strips encoders 2 B D"]:
    """Sums of x and of x squared over the pixels of each strip, x what the encoders' next unknown norms get.

    The strips are to be added in float64: a single sum over a large map would lose digits in float32.
    """
    height, rows = maps.image.shape[1], maps.strip_rows
    begins = np.arange(0, height, rows, dtype=np.int32)

    def sums(begin):
        first = jnp.minimum(begin, height - rows)
        new = (first + jnp.arange(rows) >= begin)[:, None, None]  # the last strip overlaps the one before
        strips = [jnp.where(new, maps.strip(model, name, first, rows), 0).astype(jnp.float32) for name in names]
        return jnp.stack([jnp.stack([x.sum((1, 2)), jnp.square(x).sum((1, 2))]) for x in strips])

    return lax.map(sums, begins)


@jax.jit
@standard_promotion()
def hold_guide(model: AnyUp, maps: RecomputedMaps) -> Float[Array, "B H W D"]:
    """Compute the whole guide, strip by strip."""
    (batch, height, width), rows = maps.image.shape[:3], maps.strip_rows

    def step(i, guide):
        first = jnp.minimum(i * rows, height - rows)
        return lax.dynamic_update_slice_in_dim(guide, maps.guide(model, first, rows), first, 1)

    start = jnp.zeros((batch, height, width, model.config.qk_dim), model.dtype)
    return lax.fori_loop(0, -(-height // rows), step, start)


def pooled(
    model: AnyUp,
    name: str,
    maps: RecomputedMaps,
    starts: Int[Array, " pieces"],
    shares: Float[Array, "pieces rows size"],
    width: int,
) -> Float[Array, "B rows width D"]:
    """Rows of an encoder's output, averaged over a grid `width` cells wide, piece by piece."""
    batch, wide = len(maps.image), min(width, maps.image.shape[2])

    def step(total, piece):
        start, share = piece
        x = maps.strip(model, name, start, share.shape[1])
        x = adaptive_average_pool(x, (x.shape[1], wide)).astype(jnp.float32)
        return total + jnp.einsum("rs,bswd->brwd", share, x, precision=lax.Precision.HIGHEST), None

    total = jnp.zeros((batch, shares.shape[1], wide, model.config.qk_dim))
    total, _ = lax.scan(step, total, (starts, shares))
    return adaptive_average_pool(total, (total.shape[1], width)).astype(model.dtype)


@jax.jit
@standard_promotion()
def describe(
    model: AnyUp, maps: RecomputedMaps, features: Float[Array, "B h w C"], starts, shares
) -> Float[Array, "B h w D"]:
    """Return the keys of the features."""
    grid = grid_of(features)
    key = pooled(model, "key_encoder", maps, starts, shares, grid[1])
    return model.describe(ImageCode({grid: key}, {}), features)


@functools.partial(jax.jit, static_argnames=("plan", "dtype"))
@standard_promotion()
def finish(
    model: AnyUp,
    maps: RecomputedMaps,
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    starts: Int[Array, " pieces"],
    shares: Float[Array, "pieces around size"],
    band: Int[Array, ""],
    plan: Plan,
    dtype: np.dtype,
) -> Float[Array, "B rows Wo E"]:
    """Compute a band of the output; one program serves all bands."""
    query = pooled(model, "query_encoder", maps, starts, shares, plan.size[1])
    code = ImageCode({}, {plan.size: query}, BandRows(band, plan.size[0], plan))
    return model.decode(code, [(key, values)], plan.size, plan.q_chunk_size)[0].astype(dtype)
