"""What `--inspect` prints: the tensors of a file beside their counterparts in the other framework."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from anyup_core.checkpoints import key_table
from anyup_core.checkpoints.checkpoint import by_name, fits, shape_text
from anyup_core.checkpoints.encoder_checkpoint import present
from anyup_core.encoders import catalogue
from anyup_core.encoders.rows import Row


class Line(NamedTuple):
    """A tensor of the file, or one that is missing there.

    Attributes:
        torch: PyTorch key, or "-" if the table has none.
        flax: Flax path, "-" likewise; a PyTorch tensor in several parts has a line for each, and so have several
            PyTorch tensors that are stacked in one of Flax, unless that is the file's layout.
        shape: of the tensor, or of its part, in the file's layout; 0 stands for any size.
        dtype: number type, "" if missing.
        note: "unused" for weights that never reach the output, or what is wrong.
    """

    torch: str
    flax: str
    shape: tuple[int, ...]
    dtype: str
    note: str

    @property
    def parameters(self) -> int:
        return math.prod(self.shape) if self.dtype else 0


def lines(
    tensors: Mapping[str, np.ndarray], *, flax: bool, name: str | None = None, rows: tuple[Row, ...] | None = None
) -> Iterator[Line]:
    """Yield the lines of AnyUp's table, or of another, and then those of tensors that it does not know.

    Args:
        tensors: of the file, by PyTorch keys, or by Flax paths if `flax`.
        flax: which of the two.
        name: of the encoder.
        rows: the table, where it is another one.
    """
    if rows is not None:
        pass
    elif name is None:
        rows = key_table.expand(key_table.sizes_of(tensors, flax=flax))
    else:
        rows = present(catalogue.find(name).config.rows(), tensors)
    for row in rows:
        part = "" if row.part is None else f" [{row.part[0] + 1}/{row.part[1]}]"
        must = row.flax_shape if flax else row.shape
        for layer, key in enumerate((row.torch,) if flax else row.keys, start=1):
            torch, path = key + part, f"{row.flax} [{layer}/{row.stack}]" if row.stack and not flax else row.flax
            tensor = tensors.get(row.flax if flax else key)
            if tensor is None:
                yield Line(torch, path, tuple(size or 0 for size in must), "", "missing")
                continue
            shape, note = tensor.shape, "unused" if row.unused else ""
            if not fits(shape, must):
                note = f"must be {shape_text(must)}"
            elif row.part is not None and not flax:
                shape = (shape[0] // row.part[1], *shape[1:])
            yield Line(torch, path, shape, str(tensor.dtype), note)
    known = by_name(rows, flax=flax)
    for unknown, tensor in tensors.items():
        if unknown not in known:
            torch, path = ("-", unknown) if flax else (unknown, "-")
            yield Line(torch, path, tensor.shape, str(tensor.dtype), "not in the table")


def render(
    tensors: Mapping[str, np.ndarray], *, flax: bool, name: str | None = None, rows: tuple[Row, ...] | None = None
) -> Any:
    """Return the lines as a rich table, arguments as for `lines`; the title counts tensors and parameters."""
    from rich.table import Table

    total = sum(tensor.size for tensor in tensors.values())
    layout = "Flax" if flax else "PyTorch"
    title = f"{name or 'AnyUp'}: {len(tensors)} tensors, {total:,} parameters, in {layout}'s layout"
    grid = Table("PyTorch", "Flax", "shape", "type", "parameters", "note", title=title)
    grid.columns[4].justify = "right"
    for line in lines(tensors, flax=flax, name=name, rows=rows):
        shape = " x ".join(str(size or "any") for size in line.shape) or "scalar"
        torch, path = (text.replace("[", r"\[") for text in (line.torch, line.flax))
        grid.add_row(torch, path, shape, line.dtype, f"{line.parameters:,}", line.note)
    return grid
