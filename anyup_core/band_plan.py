"""How an output is cut into bands of rows, and which rows of the image a band needs."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from anyup_core import geometry
from anyup_core.checks import is_whole
from anyup_core.config import AnyUpConfig
from anyup_core.geometry import AxisWindow, axis_window
from anyup_core.settings import require

BAND = 1 << 26  # numbers in a band of the output, where the caller does not say how many rows it has


def plan_bands(
    config: AnyUpConfig,
    size: tuple[int, int],
    cells: tuple[int, int],
    channels: int,
    rows: int | None,
    q_chunk_size: int | None,
) -> Plan:
    """Choose bands of `rows` rows, or, where that is None, of about BAND numbers.

    Args:
        config: the model's.
        size, cells: height and width of the output and of the features.
        channels: numbers held for a position of the output, over the whole batch.
        rows, q_chunk_size: as the caller gave them.

    Raises:
        ValueError: if `rows` is no positive whole number, or a window holds no key.
    """
    positive = rows is None or (is_whole(rows) and rows >= 1)
    require(positive, "rows", rows, "give a whole number of at least 1, or None for bands of a moderate size")
    for n, m in zip(size, cells):
        axis_window(n, m, config.window_ratio, config.window)  # it refuses
    if rows is None:
        rows, cell = max(1, BAND // (size[1] * channels)), max(1, size[0] // cells[0])
        if rows < size[0]:  # whole cells, or a power of two within a cell, so that tiles of a good size fit into it
            rows = rows // cell * cell if rows >= cell else 1 << (rows.bit_length() - 1)
    return Plan(size, cells, min(int(rows), size[0]), None if q_chunk_size is None else int(q_chunk_size))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of output, features and bands.

    Bands have `rows` rows throughout, the last one begins early enough to end with the output.
    """

    size: tuple[int, int]
    cells: tuple[int, int]
    rows: int
    q_chunk_size: int | None

    @property
    def count(self) -> int:
        return -(-self.size[0] // self.rows)

    def first(self, band: int) -> int:
        return min(band * self.rows, self.size[0] - self.rows)

    def windows(self, ratio: float, window: str) -> tuple[AxisWindow, AxisWindow]:
        """Windows of all bands' rows, one band after the other, and of the columns."""
        tall, wide = (axis_window(n, m, ratio, window) for n, m in zip(self.size, self.cells))
        index = np.concatenate([self.first(band) + np.arange(self.rows) for band in range(self.count)])
        return AxisWindow(tall.keys, tall.start[index], tall.count[index]), wide


class Pieces:
    """Which rows of an image some rows of its average over a grid need, in pieces of equal size.

    Args:
        height, out: rows of the image and of the whole grid.
        rows: rows of the grid wanted at once.
        limit: most image rows in a piece.
        border: further rows of the grid at either end; those outside of it get no share and stay zero.
    """

    def __init__(self, height: int, out: int, rows: int, limit: int, border: int = 0):
        self.height, self.out, self.border = height, out, border
        self.index, self.weights = geometry.pool_bins(height, out)
        self.wanted = np.arange(-border, rows + border)
        first = np.arange(out - rows + 1)
        low, high = np.maximum(first - border, 0), np.minimum(first + rows + border, out)
        longest = int((-(-high * height // out) - low * height // out).max())
        self.count = -(-longest // limit)
        self.size = -(-longest // self.count)

    def shares(self, first: int) -> tuple[Int[np.ndarray, " pieces"], Float[np.ndarray, "pieces rows size"]]:
        """Return the pieces' first image rows and what their rows contribute to the grid's, `first` on."""
        wanted = first + self.wanted
        inside = np.flatnonzero((wanted >= 0) & (wanted < self.out))
        table = np.zeros((len(wanted), self.height), np.float32)
        np.add.at(table, (inside[:, None], self.index[wanted[inside]]), self.weights[wanted[inside]])
        low = wanted[inside[0]] * self.height // self.out
        starts = np.minimum(low + self.size * np.arange(self.count), self.height - self.size).astype(np.int32)
        shares = np.empty((self.count, len(wanted), self.size), np.float32)
        for piece, start in zip(shares, starts):
            piece[:] = table[:, start : start + self.size]
            table[:, start : start + self.size] = 0  # the last pieces may overlap
        return starts, shares
