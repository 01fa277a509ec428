"""The tokens of a vision transformer as a feature map, NHWC."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float

from anyup_core.tokens import Sides, token_grid


def tokens_to_map(
    tokens: Float[Array | np.ndarray, "B N C"], image_size: Sides, patch: Sides, prefix: int | None = None
) -> Float[Array | np.ndarray, "B h w C"]:
    """Return the cells of an image among the tokens of a vision transformer, as a map that can be upsampled.

    Args:
        tokens: class and register tokens, if there are any, and after them h * w cells, row by row.
        image_size: height and width of the image that the transformer saw, or one number for both.
        patch: height and width of a cell in pixels, or one number for both; h = H / patch and w = W / patch.
        prefix: number of class and register tokens; by default those that are no cells, up to 32.

    Raises:
        ValueError: for a shape, a size or a prefix that do not fit, and an image that is not made of whole patches.
        TypeError: for tokens that are no JAX or NumPy array, and for sizes that are not whole numbers.
    """
    skipped, (h, w) = token_grid("NHWC", tokens, image_size, patch, prefix)
    return tokens[:, skipped:].reshape(tokens.shape[0], h, w, tokens.shape[2])
