"""Functions of single pixels, and their gradients, block of image rows by block of image rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def map_rows(
    function: Callable[..., Array], *images: Float[Array, "_ H _ _"], buffer: Float[Array, "B H W _"] | None = None
) -> Float[Array, "B H W D"]:
    """Apply a function of single pixels in blocks of image rows, and write them into `buffer` where its shape allows.

    The result is that of `function(*images)`. Intermediate arrays exist for one block only; the gradient keeps the
    images and computes the rest again, block by block. `buffer` is an image that is read by nobody else, by default
    the first of the images; those after it may have a batch or a width of 1.
    """
    height, rows = images[0].shape[1], block_rows(images[0].shape)
    samples = [image[:, :1] for image in images]
    block = jax.eval_shape(function, *samples)
    result = images[0] if buffer is None else buffer
    if rows >= height or block.shape[-1] != result.shape[-1] or block.dtype != result.dtype:
        return jax.checkpoint(function)(*images)
    converted = {}
    for size in {rows, height % rows} - {0}:
        converted[size], constants = jax.closure_convert(function, *(image[:, :size] for image in images))
    return _map_rows(Blocks(converted, rows), constants, images, None if buffer is None else lax.stop_gradient(buffer))


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
def _map_rows(blocks, constants, images, buffer):
    def step(function, first, size, result):
        sources = images if buffer is not None else (result, *images[1:])
        sources = [lax.dynamic_slice_in_dim(image, first, size, 1) for image in sources]
        return lax.dynamic_update_slice_in_dim(result, function(*sources, *constants), first, 1)

    return blocks.fold(step, images[0].shape[1], images[0] if buffer is None else buffer)


def _map_rows_forward(blocks, constants, images, buffer):
    return _map_rows(blocks, constants, images, buffer), (constants, images)


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
