"""What one pass over a batch of images leaves behind: all that upsampling any of their feature maps needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from anyup_core.checks import encoded
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
