"""The tokens of a vision transformer: which of them are the cells of the image, and how many rows they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyup_core.checks import check_kind, is_whole, two_sides

Sides = int | Sequence[int]  # of a square, or height and width
MOST_PREFIX_TOKENS = 32  # taken for class and register tokens unless a prefix says so; DINOv2 has 5 at most


def token_grid(
    layout: str, tokens: Any, image_size: Sides, patch: Sides, prefix: int | None
) -> tuple[int, tuple[int, int]]:
    """Return the number of leading tokens that are no cells, and the height and width of the grid of cells.

    Args:
        layout: "NHWC" or "NCHW", the order of the axes of the map that is to be made.
        tokens: an array or a tensor (B, prefix + h * w, C), of which the shape is read.
        image_size: of the image that the transformer saw, in pixels.
        patch: pixels of a cell along either axis.
        prefix: number of leading class and register tokens; None for whatever is not a cell.

    Raises:
        ValueError: for a shape, a size or a prefix that do not fit, an image that is not made of whole patches, and for
            more than `MOST_PREFIX_TOKENS` leading tokens unless `prefix` gives their number.
        TypeError: for tokens of the other framework, and for sizes that are not whole numbers.
    """
    check_kind("tokens", tokens, layout)
    shape = tuple(tokens.shape)
    if len(shape) != 3:
        raise ValueError(f"tokens has shape {shape}; it must have three axes: batch, tokens and channels.")
    if prefix is not None and not (is_whole(prefix) and prefix >= 0):
        raise ValueError(f"prefix={prefix!r} must be a number of tokens, 0 or more, or None to infer it.")
    (height, width), (rows, columns) = two_sides("image_size", image_size), two_sides("patch", patch)
    h, w = height // rows, width // columns
    if height % rows or width % columns:
        cropped, padded = (h * rows, w * columns), (-(-height // rows) * rows, -(-width // columns) * columns)
        raise ValueError(
            f"image_size={(height, width)} is not made of whole patches of {rows} x {columns} pixels. Give the size "
            f"that the transformer worked on, {cropped} if it crops the image or {padded} if it pads it, and crop or "
            "pad the guidance alike."
        )
    cells = f"an image of {height} x {width} pixels with patches of {rows} x {columns} has {h} x {w} = {h * w} cells"
    others = shape[1] - h * w
    if others < 0:
        raise ValueError(
            f"tokens {shape} are {shape[1]} per image, but {cells}. Give the image_size they were made of."
        )
    if prefix is not None and prefix != others:
        raise ValueError(
            f"tokens {shape} are {shape[1]} per image; {cells}, which leaves {others}, not prefix={prefix}."
        )
    if prefix is None and others > MOST_PREFIX_TOKENS:
        raise ValueError(
            f"tokens {shape} are {shape[1]} per image; {cells}, which leaves {others} class and register tokens. Give "
            f"the image_size the tokens were made of, or prefix={others} if there are that many."
        )
    return others, (h, w)
