"""What `--inspect` prints: the tensors of a file beside their counterparts in the other framework."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from rich.table import Table

from convert import table
from convert.apply import sizes_of_flax


class Line(NamedTuple):
    """A tensor of the file, or one that is missing there.

    Attributes:
        torch: PyTorch key, or "-" if the table has none.
        flax: Flax path, "-" likewise; a PyTorch tensor in several parts has a line for each.
        shape: of the tensor, or of its part, in the file's layout.
        dtype: number type, "" if missing.
        note: "carried" for weights that never reach the output, or what is wrong.
    """

    torch: str
    flax: str
    shape: tuple[int, ...]
    dtype: str
    note: str

    @property
    def parameters(self) -> int:
        return math.prod(self.shape) if self.dtype else 0


def lines(tensors: Mapping[str, np.ndarray], *, flax: bool) -> Iterator[Line]:
    """Yield the table's lines, then those of tensors that it does not know; `flax`: the names are Flax paths."""
    sizes = sizes_of_flax(tensors) if flax else table.sizes_of({name: x.shape for name, x in tensors.items()})
    entries = table.expand(sizes)
    for entry in entries:
        name, must = (entry.flax, entry.flax_shape) if flax else (entry.torch, entry.torch_shape)
        part = "" if entry.part is None else f" [{entry.part[0] + 1}/{entry.part[1]}]"
        if name not in tensors:
            yield Line(entry.torch + part, entry.flax, must, "", "missing")
            continue
        shape, note = tensors[name].shape, "carried" if entry.carried else ""
        if shape != must:
            note = f"must be {must}"
        elif entry.part is not None and not flax:
            shape = (shape[0] // entry.part[1], *shape[1:])
        yield Line(entry.torch + part, entry.flax, shape, str(tensors[name].dtype), note)
    known = {entry.flax if flax else entry.torch for entry in entries}
    for name, tensor in tensors.items():
        if name not in known:
            torch, path = ("-", name) if flax else (name, "-")
            yield Line(torch, path, tensor.shape, str(tensor.dtype), "not in the table")


def render(tensors: Mapping[str, np.ndarray], *, flax: bool) -> Table:
    """Return the lines as a rich table; the title counts tensors and parameters."""
    total = sum(tensor.size for tensor in tensors.values())
    layout = "Flax" if flax else "PyTorch"
    title = f"{len(tensors)} tensors, {total:,} parameters, in {layout}'s layout"
    grid = Table("PyTorch", "Flax", "shape", "type", "parameters", "note", title=title)
    grid.columns[4].justify = "right"
    for line in lines(tensors, flax=flax):
        shape = " x ".join(map(str, line.shape)) or "scalar"
        grid.add_row(line.torch.replace("[", r"\["), line.flax, shape, line.dtype, f"{line.parameters:,}", line.note)
    return grid
