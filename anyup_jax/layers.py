"""The layers of AnyUp in Flax nnx, NHWC, in the order of `anyup_torch/layers.py`.

Parameters are float32. `dtype` is the type of the convolutions and activations; norm statistics, rotary angles and
softmax stay in float32 whatever it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core import geometry
from anyup_core.config import NORM_GROUPS
from anyup_jax.strips import WHOLE, Whole, adaptive_average_pool

GROUP_NORM_EPS = 1e-5
RMS_NORM_EPS = float(np.finfo(np.float32).eps)


class Carried(nnx.Variable):
    """A published weight that never reaches the output: kept for conversion without loss, never trained."""


def precision(dtype: DTypeLike) -> lax.Precision:
    """Matrix products in float32 are exact to float32 on every platform; other types use the platform's default."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT


@jax.custom_jvp
def silu(x: Float[Array, ...]) -> Float[Array, ...]:
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


def map_rows(
    function: Callable[..., Array], *images: Float[Array, "_ H _ _"], spare: Float[Array, "B H W _"] | None = None
) -> Float[Array, "B H W D"]:
    """Apply a function of single pixels in blocks of image rows, which overwrite `spare` where its shape allows.

    The same as `function(*images)`. What the function holds in between exists for one block only; the gradient keeps
    the images and computes the rest again, block by block. `spare` is an image that nobody reads afterwards, by default
    the first of the images; those after it may have a batch or a width of 1.
    """
    height, rows = images[0].shape[1], block_rows(images[0].shape)
    samples = [image[:, :1] for image in images]
    block = jax.eval_shape(function, *samples)
    result = images[0] if spare is None else spare
    if rows >= height or block.shape[-1] != result.shape[-1] or block.dtype != result.dtype:
        return jax.checkpoint(function)(*images)
    converted = {}
    for size in {rows, height % rows} - {0}:
        converted[size], constants = jax.closure_convert(function, *(image[:, :size] for image in images))
    return _map_rows(Blocks(converted, rows), constants, images, None if spare is None else lax.stop_gradient(spare))


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A function of blocks of rows, its closure as further arguments: for `rows` rows, and for what is left over."""

    functions: dict[int, Callable[..., Array]]
    rows: int

    def fold(self, step: Callable, height: int, start):
        """Apply `step(function, first row, rows, state)` to every block."""
        rows = self.rows
        usual = self.functions.get(rows)
        state = lax.fori_loop(0, height // rows, lambda i, x: step(usual, i * rows, rows, x), start)
        if tail := height % rows:
            state = step(self.functions.get(tail), height - tail, tail, state)
        return state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_rows(blocks, constants, images, spare):
    def step(function, first, size, result):
        sources = images if spare is not None else (result, *images[1:])
        sources = [lax.dynamic_slice_in_dim(image, first, size, 1) for image in sources]
        return lax.dynamic_update_slice_in_dim(result, function(*sources, *constants), first, 1)

    return blocks.fold(step, images[0].shape[1], images[0] if spare is None else spare)


def _map_rows_forward(blocks, constants, images, spare):
    return _map_rows(blocks, constants, images, spare), (constants, images)


def _map_rows_backward(blocks, saved, cotangent):
    constants, images = saved

    def step(function, first, size, gradients):
        to_constants, to_images = gradients
        slice_rows = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1)
        _, pull = jax.vjp(
            lambda constants, blocks: function(*blocks, *constants), constants, [slice_rows(x) for x in images]
        )
        more, changes = pull(slice_rows(cotangent))
        to_constants = [total + x.astype(total.dtype) for total, x in zip(to_constants, more)]
        update = functools.partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
        return to_constants, [update(whole, change) for whole, change in zip(to_images, changes)]

    wide = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in constants]
    start = wide, [jnp.zeros_like(x) for x in images]
    to_constants, to_images = blocks.fold(step, images[0].shape[1], start)
    return [x.astype(c.dtype) for x, c in zip(to_constants, constants)], tuple(to_images), None


_map_rows.defvjp(_map_rows_forward, _map_rows_backward)


BLOCK = 12_544  # pixels worked on at once where a layer acts on single pixels


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows of an image (B, H, W, D) worked on at once: all, or as many as hold `BLOCK` pixels at most.

    Fewer, if that makes blocks of one size and no more than twice as many: every size is compiled by itself.
    """
    batch, height, width, _ = shape
    count = -(-height // max(1, BLOCK // (batch * width)))
    count = next((more for more in range(count, 2 * count + 1) if height % more == 0), count)
    return -(-height // count)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> Float[Array, ...]:
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


class Conv(nnx.Module):
    """k x k convolution without bias; `padding` is "reflect" or "zeros". Kernel (k, k, in, out)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int = 1,
        *,
        padding: str = "reflect",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, inputs, outputs)
        self.kernel = nnx.Param(uniform(rngs, shape, (inputs * kernel_size**2) ** -0.5))
        self.padding = padding
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B _ W inputs"], strip: Whole = WHOLE) -> Float[Array, "B _ W outputs"]:
        kernel, x = self.kernel[...].astype(self.dtype), x.astype(self.dtype)
        if kernel.shape[:2] == (1, 1):
            return convolve(x, kernel, ((0, 0), (0, 0)))
        half = kernel.shape[0] // 2
        if self.padding == "reflect":
            x = jnp.take(strip.reflect(x, half), geometry.reflection(x.shape[2], half), 2)
            edges = ((0, 0), (0, 0))
        else:
            x, rows = strip.pad(x, half)
            edges = (rows, (half, half))
        return convolve(x, kernel, edges)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
    x: Float[Array, "B H W inputs"], kernel: Float[Array, "k k inputs outputs"], edges: tuple[tuple[int, int], ...]
) -> Float[Array, "B h w outputs"]:
    """Correlate with a kernel, `edges` rows and columns of zeros around x.

    XLA's gradient for the kernel is a convolution with a kernel of the image's size (of 1 x 1: a matrix product with a
    transposed copy of the image), which is slow on CPUs; there it is a matrix product for each tap and block of rows.
    """
    if kernel.shape[:2] == (1, 1):
        return jnp.matmul(x, kernel[0, 0], precision=precision(x.dtype))
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), edges, dimension_numbers=dimensions, precision=precision(x.dtype)
    )


def _convolve_forward(x, kernel, edges):
    return convolve(x, kernel, edges), (x, kernel)


def _convolve_backward(edges, saved, cotangent):
    x, kernel = saved
    (side, _, inputs, outputs), (height, width) = kernel.shape, cotangent.shape[1:3]
    back = tuple((side - 1 - before, side - 1 - after) for before, after in edges)
    to_x = convolve(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), back)

    def taps(x, cotangent):
        padded = jnp.pad(x, ((0, 0), *edges, (0, 0)))

        def step(_, first, size, total):
            strip = lax.dynamic_slice_in_dim(padded, first, size + side - 1, 1)
            block = lax.dynamic_slice_in_dim(cotangent, first, size, 1).reshape(-1, outputs)

            def tap(i, j):
                pixels = strip[:, i : i + size, j : j + width].reshape(-1, inputs)
                options = dict(precision=precision(x.dtype), preferred_element_type=jnp.float32)
                return jnp.matmul(pixels.T, block, **options)

            return total + jnp.stack([tap(i, j) for i in range(side) for j in range(side)])

        blocks = Blocks({}, block_rows(cotangent.shape))
        total = blocks.fold(step, height, jnp.zeros((side**2, inputs, outputs)))
        return total.reshape(kernel.shape).astype(x.dtype)

    def whole(x, cotangent):
        product = jax.vjp(lambda kernel: convolve.fun(x, kernel, edges), kernel)[1]
        return product(cotangent)[0]

    return to_x, lax.platform_dependent(x, cotangent, cpu=taps, default=whole)


convolve.defvjp(_convolve_forward, _convolve_backward)


class GroupNorm(nnx.Module):
    """Normalisation over the positions and the channels of each of 8 groups, then a scale and a shift per channel."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "B H W channels"]) -> Float[Array, "B H W channels"]:
        scale, shift = self.affine(x)
        return (x * scale + shift).astype(x.dtype)

    def affine(
        self, x: Float[Array, "B H W channels"], strip: Whole = WHOLE
    ) -> tuple[Float[Array, "B 1 1 channels"], ...]:
        """Return the scale and shift per image and channel that normalise `x`: two reductions and no copy of x."""
        x = x.astype(jnp.float32)
        moments = strip.mean(jnp.stack([x.mean((1, 2)), jnp.square(x).mean((1, 2))]))
        grouped = moments.reshape(2, len(x), NORM_GROUPS, -1).mean(-1)
        mean, square = jnp.repeat(grouped, x.shape[-1] // NORM_GROUPS, -1)
        scale = self.scale[...] * lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + GROUP_NORM_EPS)
        return scale[:, None, None], (self.bias[...] - mean * scale)[:, None, None]


Pool = Callable[[Float[Array, "B H W D"]], Float[Array, "B h w D"]]


def pooling(size: tuple[int, int] | None) -> Pool | None:
    """The average over a grid of `size` cells; None for none."""
    return None if size is None else functools.partial(adaptive_average_pool, size=size)


class ResBlock(nnx.Module):
    """`conv(SiLU(GN(conv(SiLU(GN(x))))))` plus the shortcut, both convolutions 1 x 1."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs)
        self.conv1 = Conv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(outputs)
        self.conv2 = Conv(outputs, outputs, dtype=dtype, rngs=rngs)
        self.shortcut = Conv(inputs, outputs, dtype=dtype, rngs=rngs) if inputs != outputs else None

    def __call__(
        self, x: Float[Array, "B H W inputs"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B h w outputs"]:
        """Apply the block, then average the result over a grid of `size` positions (None: every position).

        Everything after the second SiLU is linear in the positions, so averaging comes before the last convolution.
        """
        return self.overwrite(x, pooling(size))[0]

    def overwrite(
        self,
        x: Float[Array, "B H W inputs"],
        pool: Pool | None = None,
        spare: Float[Array, "B H W outputs"] | None = None,
        strip: Whole = WHOLE,
    ) -> tuple[Float[Array, "B h w outputs"], Float[Array, "B H W outputs"]]:
        """Do the same in the memory of `spare`, a map that nobody reads afterwards, and return the next such map too.

        `pool` averages over a grid, or over several, given as a tuple; so is the result then. XLA has no uninitialised
        memory; without a spare map it copies x to have something to overwrite.
        """
        shortcut = self.shortcut or (lambda x: x)
        norm1 = self.norm1.affine(x, strip)
        hidden = map_rows(lambda x: self.conv1(normed_silu(x, norm1)), x, spare=spare)
        norm2 = self.norm2.affine(hidden, strip)
        if pool is None:
            return map_rows(lambda x, hidden: shortcut(x) + self.conv2(normed_silu(hidden, norm2)), x, hidden), hidden
        hidden = map_rows(lambda hidden: normed_silu(hidden, norm2), hidden)
        joined = jax.tree.map(lambda x, hidden: shortcut(x) + self.conv2(hidden), pool(x), pool(hidden))
        return joined, hidden


class Encoder(nnx.Module):
    """A k x k convolution with reflected borders and two ResBlocks; both methods are as those of a ResBlock."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, kernel_size, dtype=dtype, rngs=rngs)
        self.block1 = ResBlock(outputs, outputs, dtype=dtype, rngs=rngs)
        self.block2 = ResBlock(outputs, outputs, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W inputs"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B h w outputs"]:
        return self.overwrite(x, pooling(size))[0]

    def overwrite(
        self,
        x: Float[Array, "B H W inputs"],
        pool: Pool | None = None,
        spare: Float[Array, "B H W outputs"] | None = None,
        strip: Whole = WHOLE,
    ) -> tuple[Float[Array, "B h w outputs"], Float[Array, "B H W outputs"]]:
        x, spare = self.block1.overwrite(self.conv(x, strip), spare=spare, strip=strip)
        return self.block2.overwrite(x, pool, spare, strip)


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
            basis = jnp.asarray(geometry.gaussian_derivatives(filters, kernel_size))
        else:
            basis = jax.random.normal(rngs.params(), (filters, kernel_size, kernel_size))
        self.basis = nnx.Param(basis)
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

        step = max(1, min(batch * height * width, UNIFICATION_BLOCK // (channels * filters)))
        starts = jnp.arange(0, batch * height * width, step)
        unified = lax.map(describe, starts).reshape(-1, filters)[: batch * height * width]
        return unified.reshape(batch, height, width, filters)


UNIFICATION_BLOCK = 1 << 20  # responses held at once by the feature unification


class RoPE(nnx.Module):
    """Rotates every pixel's channels by angles that are linear in its coordinates, with trained frequencies."""

    def __init__(self, dim: int):
        self.freqs = nnx.Param(jnp.asarray(geometry.rope_frequencies(dim)))

    def __call__(self, x: Float[Array, "B H W D"], strip: Whole = WHOLE) -> Float[Array, "B H W D"]:
        rows, cols = map(jnp.asarray, strip.coordinates(x.shape[1], x.shape[2]))
        return rotate(x, self.freqs[...], rows, cols)


@jax.custom_vjp
def rotate(
    x: Float[Array, "B H W D"], freqs: Float[Array, "2 D"], rows: Float[Array, " H"], cols: Float[Array, " W"]
) -> Float[Array, "B H W D"]:
    """Return x cos(a) + rotate_half(x) sin(a), with the angle a = row x freqs[0] + column x freqs[1] per channel.

    It is no rotation of channel pairs: the two channels of a pair have angles of their own.
    """
    row, col, sign = turns(freqs, rows, cols)

    def turn(x, *row):
        cos, sin = add_angles(row, col)
        return (x * cos + swap_halves(x) * (sin * sign)).astype(x.dtype)

    return map_rows(turn, x, *row)


def turns(
    freqs: Float[Array, "2 D"], rows: Float[Array, " H"], cols: Float[Array, " W"]
) -> tuple[tuple[Float[Array, "1 H 1 D"], ...], tuple[Float[Array, "W D"], ...], Float[Array, " D"]]:
    """Cosine and sine of the rows' and of the columns' angles; and the sign that rotate_half gives each channel."""
    row, col = rows[None, :, None, None] * freqs[0], cols[:, None] * freqs[1]
    sign = jnp.repeat(jnp.array([-1.0, 1.0]), freqs.shape[1] // 2)
    return (jnp.cos(row), jnp.sin(row)), (jnp.cos(col), jnp.sin(col)), sign


def add_angles(
    row: tuple[Float[Array, "1 H 1 D"], ...], col: tuple[Float[Array, "W D"], ...]
) -> tuple[Float[Array, "1 H W D"], Float[Array, "1 H W D"]]:
    """Cosine and sine of sums of angles: no sine is taken of every pixel's angle."""
    return row[0] * col[0] - row[1] * col[1], row[1] * col[0] + row[0] * col[1]


def swap_halves(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """rotate_half but for its sign, which goes to the sine: XLA fuses this, but no concatenation."""
    return jnp.flip(x.reshape(*x.shape[:-1], 2, -1), -2).reshape(x.shape)


def _rotate_forward(x, freqs, rows, cols):
    return rotate(x, freqs, rows, cols), (x, freqs, rows, cols)


def _rotate_backward(saved, cotangent):
    x, freqs, rows, cols = saved
    row, col, sign = turns(freqs, rows, cols)

    def turn_back(cotangent, *row):
        cos, sin = add_angles(row, col)
        return (cotangent * cos + swap_halves(cotangent * (sin * sign))).astype(cotangent.dtype)

    def add(_, first, size, total):
        of_block = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1)
        cos, sin = add_angles(tuple(map(of_block, row)), col)
        block = of_block(x)
        by_angle = (of_block(cotangent).astype(jnp.float32) * (swap_halves(block) * (cos * sign) - block * sin)).sum(0)
        places = jnp.meshgrid(lax.dynamic_slice_in_dim(rows, first, size), cols, indexing="ij")
        return total + jnp.einsum("khw,hwd->kd", jnp.stack(places), by_angle, precision=lax.Precision.HIGHEST)

    to_freqs = Blocks({}, block_rows(x.shape)).fold(add, x.shape[1], jnp.zeros((2, x.shape[3])))
    return map_rows(turn_back, cotangent, *row), to_freqs, None, None


rotate.defvjp(_rotate_forward, _rotate_backward)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the channels, then a scale."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))

    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + RMS_NORM_EPS)
        return (normed * self.scale[...]).astype(x.dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        variable: type[nnx.Variable] = nnx.Param,
    ):
        self.kernel = variable(uniform(rngs, (inputs, outputs), (6 / (inputs + outputs)) ** 0.5))
        self.bias = variable(jnp.zeros(outputs))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return jnp.matmul(x.astype(self.dtype), kernel, precision=precision(self.dtype)) + bias
