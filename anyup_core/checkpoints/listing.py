"""What `--inspect` prints: the tensors of a file beside their counterparts in the other framework."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from rich.table import Table

from anyup_core.checkpoints import encoder_checkpoint, key_table
from anyup_core.checkpoints.checkpoint import fits, shape_text, sizes_of_flax
from anyup_core.encoders import catalogue


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


def lines(tensors: Mapping[str, np.ndarray], *, flax: bool) -> Iterator[Line]:
    """Yield the table's lines, then those of tensors that it does not know; `flax`: the names are Flax paths."""
    sizes = sizes_of_flax(tensors) if flax else key_table.sizes_of({name: x.shape for name, x in tensors.items()})
    entries = key_table.expand(sizes)
    for entry in entries:
        name, must = (entry.flax, entry.flax_shape) if flax else (entry.torch, entry.torch_shape)
        part = "" if entry.part is None else f" [{entry.part[0] + 1}/{entry.part[1]}]"
        if name not in tensors:
            yield Line(entry.torch + part, entry.flax, must, "", "missing")
            continue
        shape, note = tensors[name].shape, "unused" if entry.unused else ""
        if shape != must:
            note = f"must be {must}"
        elif entry.part is not None and not flax:
            shape = (shape[0] // entry.part[1], *shape[1:])
        yield Line(entry.torch + part, entry.flax, shape, str(tensors[name].dtype), note)
    yield from _unknown(tensors, {entry.flax if flax else entry.torch for entry in entries}, flax=flax)


def encoder_lines(tensors: Mapping[str, np.ndarray], name: str, *, flax: bool) -> Iterator[Line]:
    """Yield the lines of an encoder's table, then those of tensors that it does not know."""
    rows = encoder_checkpoint.table(catalogue.find(name).config)
    if flax:
        groups = {row.optional for row in rows if row.flax in tensors}
        rows = [row for row in rows if not row.optional or row.optional in groups]
        expected = [(row.flax, row.torch, row.flax, row.flax_shape, row) for row in rows]
    else:
        expected = [
            (key, key, f"{row.flax} [{layer}/{row.stack}]" if row.stack else row.flax, row.shape, row)
            for row in encoder_checkpoint.present(rows, tensors)
            for layer, key in enumerate(row.keys, start=1)
        ]
    for name_in_file, torch, path, must, row in expected:
        if name_in_file not in tensors:
            yield Line(torch, path, tuple(size or 0 for size in must), "", "missing")
            continue
        shape, note = tensors[name_in_file].shape, "unused" if row.unused else ""
        if not fits(shape, must):
            note = f"must be {shape_text(must)}"
        yield Line(torch, path, shape, str(tensors[name_in_file].dtype), note)
    yield from _unknown(tensors, {name_in_file for name_in_file, *_ in expected}, flax=flax)


def _unknown(tensors: Mapping[str, np.ndarray], known: Collection[str], *, flax: bool) -> Iterator[Line]:
    for name, tensor in tensors.items():
        if name not in known:
            torch, path = ("-", name) if flax else (name, "-")
            yield Line(torch, path, tensor.shape, str(tensor.dtype), "not in the table")


def render(tensors: Mapping[str, np.ndarray], *, flax: bool, name: str | None = None) -> Table:
    """Return the lines, an encoder's if `name` is given, as a rich table; the title counts tensors and parameters."""
    total = sum(tensor.size for tensor in tensors.values())
    layout = "Flax" if flax else "PyTorch"
    title = f"{name or 'AnyUp'}: {len(tensors)} tensors, {total:,} parameters, in {layout}'s layout"
    grid = Table("PyTorch", "Flax", "shape", "type", "parameters", "note", title=title)
    grid.columns[4].justify = "right"
    for line in encoder_lines(tensors, name, flax=flax) if name else lines(tensors, flax=flax):
        shape = " x ".join(str(size or "any") for size in line.shape) or "scalar"
        torch, path = (text.replace("[", r"\[") for text in (line.torch, line.flax))
        grid.add_row(torch, path, shape, line.dtype, f"{line.parameters:,}", line.note)
    return grid
