"""The tokens of a vision transformer as a feature map, NCHW."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from anyup_core.tokens import Sides, token_grid


def tokens_to_map(
    tokens: Float[Tensor, "B N C"], image_size: Sides, patch: Sides, prefix: int | None = None
) -> Float[Tensor, "B C h w"]:
    """Return the cells of an image among the tokens of a vision transformer, as a map that can be upsampled.

    The map is a view of the tokens, in channels-last order.

    Args:
        tokens: class and register tokens, if there are any, and after them h * w cells, row by row.
        image_size: height and width of the image that the transformer saw, or one number for both.
        patch: height and width of a cell in pixels, or one number for both; h = H / patch and w = W / patch.
        prefix: number of class and register tokens; by default those that are no cells, up to 32.

    Raises:
        ValueError: for a shape, a size or a prefix that do not fit, and an image that is not made of whole patches.
        TypeError: for tokens that are no tensor, and for sizes that are not whole numbers.
    """
    skipped, (h, w) = token_grid("NCHW", tokens, image_size, patch, prefix)
    return tokens[:, skipped:].unflatten(1, (h, w)).permute(0, 3, 1, 2)
