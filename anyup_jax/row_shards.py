"""Which rows of an image are here: all of them, those of one device of a mesh axis, or a few.

Nearly every layer acts on single pixels. Those that do not ask a `Rows` object: norms for the mean
over the whole image, 3 x 3 convolutions for the neighbours' rows, the rotation for the coordinates of its rows, pooling
for a sum over the image, attention for the windows of its rows.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from anyup_core import geometry
from anyup_core.config import AnyUpConfig
from anyup_core.geometry import AxisWindow, axis_window
from anyup_jax.pooling import adaptive_average_pool, pool_axis

Size = tuple[int, int]


class Rows:
    """Every row of an image, and of the output; its subclasses stand for some of them.

    Attributes:
        count: number of equal shards that the rows are cut into.
    """

    count: int = 1

    def mean(self, local: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the mean over the image, given the mean over the rows that are here."""
        return local

    def reflect(self, x: Float[Array, "B H W D"], border: int) -> Float[Array, "B H2 W D"]:
        """Add `border` rows at both ends: the neighbours', at the image's ends reflected ones."""
        return jnp.take(x, geometry.reflection(x.shape[1], border), 1)

    def pad(self, x: Float[Array, "B H W D"], border: int) -> tuple[Float[Array, "B H2 W D"], tuple[int, int]]:
        """Add the neighbours' rows; return also how many rows of zeros the caller has to add at either end."""
        return x, (border, border)

    def coordinates(self, height: int, width: int) -> tuple[Float[Array | np.ndarray, " H"], Float[np.ndarray, " W"]]:
        """Return the coordinates of the `height` rows that are here and of the columns, in [0, 1] over the image."""
        return geometry.coordinates(height, width)

    def pool(self, x: Float[Array, "B H W D"], grid: Size) -> Float[Array, "B h w D"]:
        """Average the whole image over a grid of cells, the same on every device."""
        return adaptive_average_pool(x, grid)

    def index(self) -> Int[Array, ""] | None:
        """Return the number of this shard among the rows that `windows` describes; None if it is the only one."""
        return None

    def windows(self, config: AnyUpConfig, size: Size, grid: Size) -> tuple[AxisWindow, AxisWindow]:
        """Return the windows over a grid of cells: of the output's rows, shard after shard, and of its columns."""
        rows, cols = (axis_window(n, m, config.window_ratio, config.window) for n, m in zip(size, grid))
        return rows, cols


@dataclasses.dataclass(frozen=True)
class DeviceRows(Rows):
    """The rows of one of `count` devices along the mesh axis `axis`, within `shard_map`."""

    axis: str
    count: int

    def mean(self, local):
        return lax.pmean(local, self.axis)

    def index(self):
        return lax.axis_index(self.axis)

    def reflect(self, x, border):
        above, below = self._neighbours(x, border)
        above = jnp.where(self.index() == 0, jnp.flip(x[:, 1 : border + 1], 1), above)
        below = jnp.where(self.index() == self.count - 1, jnp.flip(x[:, -border - 1 : -1], 1), below)
        return jnp.concatenate([above, x, below], 1)

    def pad(self, x, border):
        above, below = self._neighbours(x, border)
        return jnp.concatenate([above, x, below], 1), (0, 0)

    def _neighbours(self, x: Float[Array, "B H W D"], border: int) -> tuple[Float[Array, "B border W D"], ...]:
        """Return the rows above and below; zeros at the image's ends, which is what `ppermute` leaves there."""
        down = [(i, i + 1) for i in range(self.count - 1)]
        above = lax.ppermute(x[:, -border:], self.axis, down)
        below = lax.ppermute(x[:, :border], self.axis, [(i, j) for j, i in down])
        return above, below

    def coordinates(self, height, width):
        rows, cols = geometry.coordinates(height * self.count, width)
        return lax.dynamic_slice_in_dim(jnp.asarray(rows), self.index() * height, height), cols

    def pool(self, x, grid):
        height = x.shape[1]
        index, weights = geometry.pool_bins(height * self.count, grid[0])
        shares = np.zeros((grid[0], height * self.count), np.float32)  # what each row contributes to each average
        np.add.at(shares, (np.arange(grid[0])[:, None], index), weights)
        shares = lax.dynamic_slice_in_dim(jnp.asarray(shares), self.index() * height, height, 1)
        pooled = pool_axis(x, grid[1], 2).astype(jnp.float32)
        pooled = jnp.einsum("hH,bHwd->bhwd", shares, pooled, precision=lax.Precision.HIGHEST)
        return lax.psum(pooled, self.axis).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class CutRows(Rows):
    """A few rows of an image of `height`, from row `first` on, together with the border rows that convolutions need."""

    first: Int[Array, ""]
    height: int

    def reflect(self, x, border):
        return x

    def pad(self, x, border):
        return x, (0, 0)

    def coordinates(self, height, width):
        rows, cols = geometry.coordinates(self.height, width)
        return lax.dynamic_slice_in_dim(jnp.asarray(rows), self.first, height), cols


ALL_ROWS = Rows()
