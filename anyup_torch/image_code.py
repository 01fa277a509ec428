"""What one pass over a batch of images leaves behind: all that upsampling any of their feature maps needs."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anyup_core.checks import encoded

Size = tuple[int, int]
Map = tuple[Float[Tensor, "B D _ _"], Float[Tensor, "B _ _ _"]]  # keys of a feature map, and what is averaged


@dataclasses.dataclass
class ImageCode:
    """Keys and queries of a batch of images, as `AnyUp.encode_image` returns them; the guide is not part of it.

    Attributes:
        keys: for each grid of cells the output of the key encoder averaged over it, (B, D, h, w).
        queries: for each output size the output of the query encoder averaged over it, (B, D, Ho, Wo).
        affine: scale and shift of the queries' channels, which `query_rows` applies; None for none.
    """

    keys: dict[Size, Float[Tensor, "B D _ _"]]
    queries: dict[Size, Float[Tensor, "B D _ _"]]
    affine: tuple[Float[Tensor, " D"], Float[Tensor, " D"]] | None = None

    def key(self, grid: Size) -> Float[Tensor, "B D h w"]:
        """Return the keys of a grid; ValueError where the image was not encoded for it."""
        return encoded(self.keys, grid, "grids")

    def query(self, size: Size) -> Float[Tensor, "B D Ho Wo"]:
        """Return the queries of an output size; ValueError where the image was not encoded for it."""
        return encoded(self.queries, size, "sizes")

    def query_rows(self, size: Size, first: int, rows: int) -> Float[Tensor, "B _ Wo D"]:
        """Return `rows` rows of queries from `first` on and one more at either end, zeros outside of the output."""
        query = self.query(size).permute(0, 2, 3, 1)
        above, below = int(first == 0), int(first + rows == size[0])
        query = query[:, first - 1 + above : first + rows + 1 - below]
        if self.affine is not None:
            query = torch.addcmul(self.affine[1], query, self.affine[0])
        return F.pad(query, (0, 0, 0, 0, above, below)) if above or below else query
