"""Images whose sides are no multiple of an encoder's stride: padded with zeros, and the cells there cropped."""

from __future__ import annotations

from anyup_core.export.builder import Graph


def padded(g: Graph, size: str, stride: int) -> str:
    """Return the sides, rounded up to a multiple of the stride."""
    whole = g.op("Div", g.op("Add", size, g.ints(stride - 1)), g.ints(stride))
    return g.op("Mul", whole, g.ints(stride))


def pad(g: Graph, image: str, size: str, stride: int) -> str:
    """Return the image with zeros below and on the right, up to a multiple of the stride."""
    missing = g.op("Sub", padded(g, size, stride), size)
    return g.op("Pad", image, g.op("Concat", g.ints(0, 0, 0, 0, 0, 0), missing, axis=0))


def crop(g: Graph, x: str, size: str, stride: int) -> str:
    """Return the cells that lie wholly on the image."""
    return g.op("Slice", x, g.ints(0, 0), g.op("Div", size, g.ints(stride)), g.ints(2, 3))
