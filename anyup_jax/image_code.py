"""What one pass over a batch of images leaves behind: all that upsampling any of their feature maps needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anyup_core.checks import encoded
from anyup_jax.pooling import adaptive_average_pool
from anyup_jax.row_shards import ALL_ROWS, Rows, Size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageCode:
    """Keys and queries of a batch of images, as `AnyUp.encode_image` returns them; the guide is not part of it.

    It is a pytree, so that compiled functions may take and return it.

    Attributes:
        keys: for each grid of cells the output of the key encoder averaged over it, (B, h, w, D).
        queries: for each output size the output of the query encoder averaged over it, (B, Ho, Wo, D).
        rows: which rows of the image, and so of the queries, are here.
    """

    keys: Mapping[Size, Float[Array, "B _ _ D"]]
    queries: Mapping[Size, Float[Array, "B _ _ D"]]
    rows: Rows = dataclasses.field(default=ALL_ROWS, metadata=dict(static=True))

    def key(self, grid: Size) -> Float[Array, "B h w D"]:
        """Return the keys of a grid; ValueError where the image was not encoded for it."""
        return encoded(self.keys, grid, "grids")

    def query(self, size: Size) -> Float[Array, "B _ Wo D"]:
        """Return the queries of an output size; ValueError where the image was not encoded for it."""
        return encoded(self.queries, size, "sizes")


def encode_image(
    model: Any, image: Float[Array | np.ndarray, "B _ W C"], grids: Sequence[Size], sizes: Sequence[Size], rows: Rows
) -> ImageCode:
    """Compute `AnyUp.encode_image` with the encoders of a model for image, keys and queries and its rotation."""
    guide, buffer = model.image_encoder.with_buffer(jnp.asarray(native(image), model.dtype), rows=rows)
    guide = model.rope(guide, rows)
    keys, buffer = model.key_encoder.with_buffer(
        guide, lambda x: {grid: rows.pool(x, grid) for grid in grids}, rows, buffer
    )
    guide = after(guide, keys)
    shapes = {size: (size[0] // rows.count, size[1]) for size in sizes}
    if set(shapes.values()) == {guide.shape[1:3]}:  # nothing to average: the last block stays in its memory
        query: Array = model.query_encoder.with_buffer(guide, None, rows, buffer)[0]
        return ImageCode(keys, dict.fromkeys(shapes, query), rows)
    queries, _ = model.query_encoder.with_buffer(
        guide, lambda x: {size: adaptive_average_pool(x, shape) for size, shape in shapes.items()}, rows, buffer
    )
    return ImageCode(keys, queries, rows)


def native(arrays: Any) -> Any:
    """Return a tree of arrays, those of NumPy in this machine's byte order: JAX has no other."""
    return jax.tree.map(lambda x: np.asarray(x, x.dtype.newbyteorder("=")) if isinstance(x, np.ndarray) else x, arrays)


def after(guide: Float[Array, "B H W D"], keys: dict[Size, Float[Array, "B _ _ D"]]) -> Float[Array, "B H W D"]:
    """Return the guide, unchanged, as a value that XLA can compute only once it has the keys.

    Otherwise XLA encodes queries and keys side by side, and a forward pass at 448 x 448 has 412 MB of temporary arrays
    on a CPU instead of 322; `lax.optimization_barrier` is gone before XLA decides on the order. The sum is image by
    image, as NaN times 0 is NaN.
    """
    for key in keys.values():
        guide = guide + 0 * key.mean((1, 2, 3), keepdims=True, dtype=guide.dtype)
    return guide
