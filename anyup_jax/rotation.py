"""The rotary position embedding of a whole image, and its gradient, in blocks of rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from anyup_jax.blocked import Blocks, block_rows, map_rows


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
