"""Rows of key tables: which PyTorch tensor is which Flax parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from anyup_core.layouts import OIHW_TO_HWIO, SAME, TRANSPOSE, Op


@dataclasses.dataclass(frozen=True)
class Row:
    """One correspondence between PyTorch and Flax.

    Attributes:
        torch: PyTorch key; with `{i}`, one key for each of `stack` layers.
        shape: of the PyTorch tensor; None stands for any size (the number of classes).
        flax: dot-joined path in the Flax module; stacked layers share it, along a new first axis.
        op: how the layout of one layer changes.
        stack: number of layers; 0 for a row of a single tensor.
        first: index of the first of these layers.
        unused: the features do not depend on it; files keep it, so that nothing is lost, and the Flax module does not.
        optional: name of a group of rows that a checkpoint has all of or none of, such as "head".
        integer: holds whole numbers, such as a counter of batches; otherwise floating point.
        part: (i, n): the Flax parameter is only the i-th of n equal parts along the PyTorch tensor's first axis.
    """

    torch: str
    shape: tuple[int | None, ...]
    flax: str
    op: Op = SAME
    stack: int = 0
    first: int = 0
    unused: bool = False
    optional: str = ""
    integer: bool = False
    part: tuple[int, int] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The PyTorch keys of this row, in the order of the layers."""
        layers = range(self.first, self.first + self.stack)
        return tuple(self.torch.format(i=i) for i in layers) if self.stack else (self.torch,)

    @property
    def flax_shape(self) -> tuple[int | None, ...]:
        """The shape of the Flax parameter."""
        layer = self.to_flax(np.broadcast_to(np.float32(0), [size or 0 for size in self.shape]))
        sizes = tuple(size or None for size in layer.shape)
        return (self.stack, *sizes) if self.stack else sizes

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """Return the Flax parameter, one layer of it if it is stacked: a view."""
        if self.part is not None:
            index, parts = self.part
            tensor = np.split(tensor, parts)[index]
        return self.op.to_flax(tensor)


def linear(torch: str, inputs: int, outputs: int | None, flax: str, **options) -> Iterator[Row]:
    """Yield the rows of a linear layer; `options` are those of `Row`, here and below."""
    yield Row(f"{torch}.weight", (outputs, inputs), f"{flax}.kernel", TRANSPOSE, **options)
    yield Row(f"{torch}.bias", (outputs,), f"{flax}.bias", **options)


def conv(torch: str, shape: tuple[int, int, int, int], flax: str, *, bias: bool = True, **options) -> Iterator[Row]:
    """Yield the rows of a convolution; `shape` is (out, in, k, k)."""
    yield Row(f"{torch}.weight", shape, f"{flax}.kernel", OIHW_TO_HWIO, **options)
    if bias:
        yield Row(f"{torch}.bias", shape[:1], f"{flax}.bias", **options)


def norm(torch: str, width: int, flax: str, **options) -> Iterator[Row]:
    """Yield the scale and the shift of a norm."""
    yield Row(f"{torch}.weight", (width,), f"{flax}.scale", **options)
    yield Row(f"{torch}.bias", (width,), f"{flax}.bias", **options)


def batch_norm(torch: str, width: int, flax: str, **options) -> Iterator[Row]:
    """Yield scale, shift and running statistics of a batch norm, and its counter of training batches."""
    yield from norm(torch, width, flax, **options)
    yield Row(f"{torch}.running_mean", (width,), f"{flax}.mean", **options)
    yield Row(f"{torch}.running_var", (width,), f"{flax}.var", **options)
    counter = dict(unused=True, optional="counters", integer=True)
    yield Row(f"{torch}.num_batches_tracked", (), f"{flax}.batches", **counter, **options)


def conv_norm(torch: str, torch_norm: str, shape: tuple[int, int, int, int], flax: str, **options) -> Iterator[Row]:
    """Yield the rows of a convolution without bias and of the batch norm after it."""
    yield from conv(torch, shape, f"{flax}.conv", bias=False, **options)
    yield from batch_norm(torch_norm, shape[0], f"{flax}.norm", **options)
