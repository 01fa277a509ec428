"""Rows of the encoders' key tables: which tensor of timm is which Flax parameter."""

from __future__ import annotations

import dataclasses

import numpy as np

from anyup_core.layouts import SAME, Op


@dataclasses.dataclass(frozen=True)
class Row:
    """One correspondence between timm and Flax.

    Attributes:
        torch: timm's key; with `{i}`, one key for each of `stack` layers.
        shape: of the PyTorch tensor; None stands for any size (the number of classes).
        flax: dot-joined path in the Flax module; stacked layers share it, along a new first axis.
        op: how the layout of one layer changes.
        stack: number of layers, 0 for a row of a single tensor.
        first: number of the first of these layers.
        carried: never reaches the features; kept in files, so that nothing is lost, but not in the Flax module.
        optional: name of a group of rows that a checkpoint has all of or none of, such as "head".
        integer: holds whole numbers, such as a counter of batches; otherwise floating point.
    """

    torch: str
    shape: tuple[int | None, ...]
    flax: str
    op: Op = SAME
    stack: int = 0
    first: int = 0
    carried: bool = False
    optional: str = ""
    integer: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """timm's keys of this row, in the order of the layers."""
        layers = range(self.first, self.first + self.stack)
        return tuple(self.torch.format(i=i) for i in layers) if self.stack else (self.torch,)

    @property
    def flax_shape(self) -> tuple[int | None, ...]:
        """The shape of the Flax parameter."""
        layer = self.op.to_flax(np.broadcast_to(np.float32(0), [size or 0 for size in self.shape]))
        sizes = tuple(size or None for size in layer.shape)
        return (self.stack, *sizes) if self.stack else sizes
