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
from jaxtyping import Array, Float, Shaped

from anyup_core.geometry import AxisTiles, tile_axis
from evaluation.config import Size
from evaluation.methods import Guide, Method

TILE = 16  # positions along an edge of a tile, at most


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of an output, along rows and columns. A tile has as many colours as its rectangle has cells."""

    rows: AxisTiles
    cols: AxisTiles

    @classmethod
    def of(cls, method: Method, cells: Size, size: Size) -> Plan | None:
        """Plan the tiles of a method; None for one that does the same to every image."""
        windows = method.windows(cells, size)
        if windows is None:
            return None
        tiles = (next(n for n in range(min(TILE, side), 0, -1) if side % n == 0) for side in size)
        return cls(*map(tile_axis, windows, tiles))

    def pick(
        self, values: Shaped[Array | np.ndarray, "B H W *rest"]
    ) -> Shaped[Array | np.ndarray, "B tiles positions *rest"]:
        """Cut a map of the output's size into tiles."""
        return rearrange(values, "b (i y) (j x) ... -> b (i j) (y x) ...", y=self.rows.size, x=self.cols.size)

    def untile(
        self, tiles: Shaped[Array | np.ndarray, "B tiles positions *rest"], size: Size
    ) -> Shaped[Array | np.ndarray, "B H W *rest"]:
        """Put tiles together again."""
        rows = self.rows.size
        return rearrange(tiles, "b (i j) (y x) ... -> b (i y) (j x) ...", i=size[0] // rows, y=rows)


def extract(
    method: Method, plans: Mapping[str, Plan], image: Guide, maps: Mapping[str, Float[Array, "B h w C"]], size: Size
) -> dict[str, Float[Array, "B tiles positions colours"]]:
    """Return a method's weights for a batch of images: how much each position of a tile takes of each of its cells.

    Args:
        method: the method.
        plans: the tiles for each encoder.
        image: with values in [0, 1]; the labels for a method that is guided by them.
        maps: the features of each encoder.
        size: of the output.
    """
    coloured = {name: (maps[name], _colour(plan, maps[name])) for name, plan in plans.items()}
    outputs = method.upsample_many(image, coloured, size)
    return {name: plan.pick(outputs[name]) for name, plan in plans.items()}


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
    starts = ((axis.start[:, None], axis.span) for axis in (plan.rows, plan.cols))
    rows, cols = (start + (np.arange(span) - start) % span for start, span in starts)  # the cell of every colour
    seen = rearrange(values[:, rows][:, :, :, cols], "b i y j x e -> b (i j) (y x) e")
    return jnp.einsum("btpk,btke->btpe", weights.astype(jnp.float32), seen, precision="highest")
