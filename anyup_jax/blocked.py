"""Functions of single pixels, convolution and rotation, and their gradients, in blocks of image rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_jax.promotion import standard_promotion


def map_rows(
    function: Callable[..., Array], *images: Float[Array, "_ H _ _"], buffer: Float[Array, "B H W _"] | None = None
) -> Float[Array, "B H W D"]:
    """Apply a function of single pixels in blocks of image rows.

    The result is that of `function(*images)`. Intermediate arrays exist for one block only; the gradient keeps the
    images and computes the rest again, block by block. The images after the first one may have a batch or a width of 1.

    The result takes the memory of the first image or, if that is read again later, of `buffer`, an array that is not:
    XLA has no uninitialised memory, and copies an array that is read again in order to write into it.
    """
    height, rows = images[0].shape[1], block_rows(images[0].shape)
    block = jax.eval_shape(function, *(image[:, :1] for image in images))
    if rows >= height or block.shape[-1] != images[0].shape[-1] or block.dtype != images[0].dtype:
        return jax.checkpoint(function)(*images)
    converted = {}
    for size in {rows, height % rows} - {0}:
        converted[size], constants = jax.closure_convert(function, *(image[:, :size] for image in images))

    def of_block(images, constants):
        return converted[images[0].shape[1]](*images, *constants)

    fits = buffer is not None and (buffer.shape, buffer.dtype) == (images[0].shape, images[0].dtype)
    return _map_rows(of_block, images, constants, lax.stop_gradient(buffer) if fits else None)


def fold_rows(step: Callable, shape: tuple[int, ...], start):
    """Apply `step(first row, number of rows, state)` to every block of rows of an image of `shape`, from the top."""
    height, rows = shape[1], block_rows(shape)
    state = lax.fori_loop(0, height // rows, lambda i, state: step(i * rows, rows, state), start)
    tail = height % rows
    return step(height - tail, tail, state) if tail else state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_rows(function, images, constants, buffer):
    def step(first, size, result):
        sources = (result, *images[1:]) if buffer is None else images
        block = [lax.dynamic_slice_in_dim(image, first, size, 1) for image in sources]
        return lax.dynamic_update_slice_in_dim(result, function(block, constants), first, 1)

    return fold_rows(step, images[0].shape, images[0] if buffer is None else buffer)


def _map_rows_forward(function, images, constants, buffer):
    return _map_rows(function, images, constants, buffer), (images, constants)


@standard_promotion()
def _map_rows_backward(function, saved, cotangent):
    images, constants = saved

    def step(first, size, gradients):
        to_images, to_constants = gradients
        slice_rows = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1)
        _, pull = jax.vjp(function, [slice_rows(x) for x in images], constants)
        changes, more = pull(slice_rows(cotangent))
        update = functools.partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=1)
        to_images = [update(whole, change) for whole, change in zip(to_images, changes)]
        return to_images, [total + x.astype(total.dtype) for total, x in zip(to_constants, more)]

    wide = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in constants]
    to_images, to_constants = fold_rows(step, images[0].shape, ([jnp.zeros_like(x) for x in images], wide))
    return tuple(to_images), [x.astype(c.dtype) for x, c in zip(to_constants, constants)], None


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


def precision(dtype: DTypeLike) -> lax.Precision:
    """Matrix products in float32 are exact to float32 on every platform; other types use the platform's default."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
    x: Float[Array, "B H W inputs"], kernel: Float[Array, "k k inputs outputs"], edges: tuple[tuple[int, int], ...]
) -> Float[Array, "B h w outputs"]:
    """Correlate with a kernel, `edges` rows and columns of zeros around x.

    XLA's gradient for the kernel is a convolution with a kernel of the image's size (of 1 x 1: a matrix product with a
    transposed copy of the image), which is slow on CPUs; there it is a matrix product for each tap and block of rows.
    """
    return _correlate(x, kernel, edges)


def _correlate(x, kernel, edges):
    if kernel.shape[:2] == (1, 1):
        return jnp.matmul(x, kernel[0, 0], precision=precision(x.dtype))
    dimensions, exact = ("NHWC", "HWIO", "NHWC"), precision(x.dtype)
    return lax.conv_general_dilated(x, kernel, (1, 1), edges, dimension_numbers=dimensions, precision=exact)


def _convolve_forward(x, kernel, edges):
    return convolve(x, kernel, edges), (x, kernel)


@standard_promotion()
def _convolve_backward(edges, saved, cotangent):
    x, kernel = saved
    (side, _, inputs, outputs), width = kernel.shape, cotangent.shape[2]
    back = tuple((side - 1 - before, side - 1 - after) for before, after in edges)
    to_x = convolve(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), back)

    def taps(x, cotangent):
        padded = jnp.pad(x, ((0, 0), *edges, (0, 0)))

        def step(first, size, total):
            strip = lax.dynamic_slice_in_dim(padded, first, size + side - 1, 1)
            block = lax.dynamic_slice_in_dim(cotangent, first, size, 1).reshape(-1, outputs)

            def tap(i, j):
                pixels = strip[:, i : i + size, j : j + width].reshape(-1, inputs)
                return jnp.matmul(pixels.T, block, precision=precision(x.dtype), preferred_element_type=jnp.float32)

            return total + jnp.stack([tap(i, j) for i in range(side) for j in range(side)])

        total = fold_rows(step, cotangent.shape, jnp.zeros((side**2, inputs, outputs)))
        return total.reshape(kernel.shape).astype(x.dtype)

    def whole(x, cotangent):
        return jax.vjp(lambda kernel: _correlate(x, kernel, edges), kernel)[1](cotangent)[0]

    return to_x, lax.platform_dependent(x, cotangent, cpu=taps, default=whole)


convolve.defvjp(_convolve_forward, _convolve_backward)


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
    freqs: Float[Array, "2 D"], rows: Float[Array | np.ndarray, " H"], cols: Float[Array | np.ndarray, " W"]
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


@standard_promotion()
def _rotate_backward(saved, cotangent):
    x, freqs, rows, cols = saved
    row, col, sign = turns(freqs, rows, cols)

    def turn_back(cotangent, *row):
        cos, sin = add_angles(row, col)
        return (cotangent * cos + swap_halves(cotangent * (sin * sign))).astype(cotangent.dtype)

    def add(first, size, total):
        of_block = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1)
        cos, sin = add_angles(tuple(map(of_block, row)), col)
        block = of_block(x)
        by_angle = (of_block(cotangent).astype(jnp.float32) * (swap_halves(block) * (cos * sign) - block * sin)).sum(0)
        places = jnp.meshgrid(lax.dynamic_slice_in_dim(rows, first, size), cols, indexing="ij")
        return total + jnp.einsum("khw,hwd->kd", jnp.stack(places), by_angle, precision=lax.Precision.HIGHEST)

    to_freqs = fold_rows(add, x.shape, jnp.zeros((2, x.shape[3])))
    return map_rows(turn_back, cotangent, *row), to_freqs, None, None


rotate.defvjp(_rotate_forward, _rotate_backward)
