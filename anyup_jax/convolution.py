"""Convolution, with a gradient for the kernel that is fast on CPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_jax.blocked import Blocks, block_rows


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
