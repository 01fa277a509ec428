"""The weights with which a method averages cells, kept per image: the method runs once, however long a probe trains.

The output is cut into tiles. All positions of a tile together see one small rectangle of cells, so what the method does
within a tile is a matrix, positions times cells. To read the matrices off, colours are upsampled: cells a rectangle
apart share a colour, so within any rectangle each colour is one cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from einops import rearrange
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
        """Cut a map of the output's size into tiles."""
        return rearrange(values, "b (i y) (j x) e -> b (i j) (y x) e", y=self.rows.tile, x=self.cols.tile)

    def untile(
        self, tiles: Shaped[Array | np.ndarray, "B tiles positions E"], size: Size
    ) -> Shaped[Array | np.ndarray, "B H W E"]:
        """Put tiles together again."""
        rows = self.rows.tile
        return rearrange(tiles, "b (i j) (y x) e -> b (i y) (j x) e", i=size[0] // rows, y=rows)


def extract(
    method: Method,
    plans: Mapping[str, Plan | None],
    image: Guide,
    maps: Mapping[str, Float[Array, "B h w C"]],
    size: Size,
) -> dict[str, Float[Array, "B tiles positions colours"]]:
    """Return a method's weights for a batch of images: how much each position of a tile takes of each of its cells.

    Args:
        method: the method.
        plans: for each encoder the tiles; None for a method that does the same to every image.
        image: with values in [0, 1]; the labels for a method that is guided by them.
        maps: the features of each encoder.
        size: of the output.
    """
    planned = {name: plan for name, plan in plans.items() if plan is not None}
    if not planned:
        return {}
    coloured = {name: (maps[name], _colour(plan, maps[name])) for name, plan in planned.items()}
    outputs = method.upsample_many(image, coloured, size)
    return {name: planned[name].pick(output) for name, output in outputs.items()}


def _colour(plan: Plan, features: Float[Array, "B h w C"]) -> Float[Array, "B h w colours"]:
    rows, cols = (
        np.eye(axis.span, dtype=np.float32)[np.arange(n) % axis.span]
        for n, axis in zip(features.shape[1:3], (plan.rows, plan.cols))
    )
    colours = rearrange(rows[:, None, :, None] * cols[None, :, None, :], "h w y x -> h w (y x)")
    return jnp.broadcast_to(colours, (len(features), *colours.shape))


def apply(
    plan: Plan, weights: Float[Array, "B tiles positions colours"], values: Float[Array, "B h w E"]
) -> Float[Array, "B tiles positions E"]:
    """Average values with a method's kept weights; these may hold any choice of the positions of each tile."""
    rows, cols = jnp.asarray(plan.rows.cells), jnp.asarray(plan.cols.cells)
    seen = rearrange(values[:, rows][:, :, :, cols], "b i y j x e -> b (i j) (y x) e")
    return jnp.einsum("btpk,btke->btpe", weights.astype(jnp.float32), seen, precision="highest")
