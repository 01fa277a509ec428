"""What a method does to one image, as numbers that can be kept: a frozen method runs once, and a probe trains for long.

The output is cut into tiles. All positions of a tile together see one small rectangle of cells, so what the method does
within a tile is a matrix, positions times cells. The matrices are found by upsampling colours: cells a rectangle apart
share a colour, so within any rectangle each colour is one cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from anyup_core.geometry import AxisWindow
from evaluation.config import Size
from evaluation.methods import Guide, Method

TILE = 16  # positions along an edge of a tile, at most


@dataclasses.dataclass(frozen=True)
class AxisPlan:
    """The tiles along one axis.

    Attributes:
        tile: positions of a tile; divides the number of positions.
        span: cells of a tile's rectangle, which is the number of colours.
        cells: (tiles, span) cell of every colour.
    """

    tile: int
    span: int
    cells: Int[np.ndarray, "tiles span"]

    @classmethod
    def of(cls, window: AxisWindow) -> AxisPlan:
        """Plan the tiles of windows along one axis."""
        seen = window.count > 0
        first = window.start + seen.argmax(1)
        last = window.start + window.count.shape[1] - seen[:, ::-1].argmax(1)
        tile = next(n for n in range(min(TILE, window.queries), 0, -1) if window.queries % n == 0)
        first, last = first.reshape(-1, tile).min(1), last.reshape(-1, tile).max(1)
        span = int((last - first).max())
        start = np.minimum(first, window.keys - span)
        cells = start[:, None] + (np.arange(span) - start[:, None]) % span
        return cls(tile, span, cells.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of an output."""

    rows: AxisPlan
    cols: AxisPlan

    @classmethod
    def of(cls, method: Method, cells: Size, size: Size) -> Plan | None:
        """Plan the tiles of a method; None for one that does the same to every image."""
        windows = method.windows(cells, size)
        return None if windows is None else cls(*map(AxisPlan.of, windows))

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along the axes."""
        return len(self.rows.cells), len(self.cols.cells)

    @property
    def colours(self) -> int:
        return self.rows.span * self.cols.span

    @property
    def positions(self) -> int:
        """Positions in a tile."""
        return self.rows.tile * self.cols.tile

    def pick(self, values: Shaped[Array | np.ndarray, "B H W E"]) -> Shaped[Array | np.ndarray, "B tiles positions E"]:
        """Cut a map into tiles."""
        (rows, cols), batch, channels = self.grid, len(values), values.shape[-1]
        cut = values.reshape(batch, rows, self.rows.tile, cols, self.cols.tile, channels)
        return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * cols, self.positions, channels)

    def untile(
        self, tiles: Shaped[Array | np.ndarray, "B tiles positions E"], size: Size
    ) -> Shaped[Array | np.ndarray, "B H W E"]:
        """Put tiles together again."""
        (rows, cols), batch, channels = self.grid, len(tiles), tiles.shape[-1]
        cut = tiles.reshape(batch, rows, cols, self.rows.tile, self.cols.tile, channels)
        return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *size, channels)


def extract(
    method: Method,
    plans: Mapping[str, Plan | None],
    image: Guide,
    maps: Mapping[str, Float[Array, "B h w C"]],
    size: Size,
) -> dict[str, Float[Array, "B tiles positions colours"]]:
    """Return what a method does to images: how much each position of a tile takes of each of its cells.

    Args:
        method: the method.
        plans: for each encoder the tiles; None where there is nothing to be found.
        image: with values in [0, 1]; the labels for a method that is guided by them.
        maps: the features of each encoder.
        size: of the output.
    """
    wanted = {name: plan for name, plan in plans.items() if plan is not None}
    colours = {name: _colour(plan, maps[name]) for name, plan in wanted.items()}
    found = method.upsample_many(image, {name: (maps[name], colours[name]) for name in wanted}, size) if wanted else {}
    return {name: wanted[name].pick(output) for name, output in found.items()}


def _colour(plan: Plan, features: Float[Array, "B h w C"]) -> Float[Array, "B h w colours"]:
    rows, cols = (
        np.eye(axis.span, dtype=np.float32)[np.arange(n) % axis.span]
        for n, axis in zip(features.shape[1:3], (plan.rows, plan.cols))
    )
    colours = (rows[:, None, :, None] * cols[None, :, None, :]).reshape(len(rows), len(cols), -1)
    return jnp.broadcast_to(colours, (len(features), *colours.shape))


def apply(
    plan: Plan, weights: Float[Array, "B tiles positions colours"], values: Float[Array, "B h w E"]
) -> Float[Array, "B tiles positions E"]:
    """Do to values what a method did; `weights` may hold any choice of the positions of each tile."""
    batch, channels = len(values), values.shape[-1]
    rows, cols = jnp.asarray(plan.rows.cells), jnp.asarray(plan.cols.cells)
    seen = values[:, rows][:, :, :, cols]  # (B, rows, spanned rows, columns, spanned columns, E)
    seen = seen.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, plan.colours, channels)
    return jnp.einsum("btpk,btke->btpe", weights.astype(jnp.float32), seen, precision="highest")
