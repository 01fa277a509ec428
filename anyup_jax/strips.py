"""The rows of an image on one device, or spread over the devices of a mesh axis: all that a layer needs to know of it.

Nearly every layer acts on single pixels. The few that do not ask one of these two classes: norms for the mean over the
whole image, 3 x 3 convolutions for their neighbours' rows, the rotation for the place of its rows, pooling for a sum.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from anyup_core import geometry


class Whole:
    """Every row is here."""

    count: int = 1

    def mean(self, local: Float[Array, ...]) -> Float[Array, ...]:
        """Mean over the image, given the mean over the rows that are here."""
        return local

    def reflect(self, x: Float[Array, "B H W D"], border: int) -> Float[Array, "B H2 W D"]:
        """Add `border` rows at both ends: the neighbours', or at the image's ends reflected ones."""
        return jnp.take(x, geometry.reflection(x.shape[1], border), 1)

    def pad(self, x: Float[Array, "B H W D"], border: int) -> tuple[Float[Array, "B H2 W D"], tuple[int, int]]:
        """Add the neighbours' rows, and return how many rows of zeros are still to be added at either end."""
        return x, (border, border)

    def coordinates(self, height: int, width: int) -> tuple[Float[Array | np.ndarray, " H"], Float[np.ndarray, " W"]]:
        """Coordinates of the `height` rows that are here and of the columns, in [0, 1] over the whole image."""
        return geometry.coordinates(height, width)

    def pool_cells(self, x: Float[Array, "B H W D"], size: tuple[int, int]) -> Float[Array, "B h w D"]:
        """Average the whole image over a grid of `size` cells, the same on every device."""
        return adaptive_average_pool(x, size)

    def index(self) -> Int[Array, ""] | None:
        """Which of the strips this one is; None where there is one only."""
        return None


@dataclasses.dataclass(frozen=True)
class Strip(Whole):
    """The rows are cut into `count` equal strips, one a device of the mesh axis `axis`, within `shard_map`."""

    axis: str
    count: int

    def mean(self, local: Float[Array, ...]) -> Float[Array, ...]:
        return lax.pmean(local, self.axis)

    def index(self) -> Int[Array, ""]:
        return lax.axis_index(self.axis)

    def reflect(self, x: Float[Array, "B H W D"], border: int) -> Float[Array, "B H2 W D"]:
        if border == 0:
            return x
        above, below = self._neighbours(x, border)
        above = jnp.where(self.index() == 0, jnp.flip(x[:, 1 : border + 1], 1), above)
        below = jnp.where(self.index() == self.count - 1, jnp.flip(x[:, -border - 1 : -1], 1), below)
        return jnp.concatenate([above, x, below], 1)

    def pad(self, x: Float[Array, "B H W D"], border: int) -> tuple[Float[Array, "B H2 W D"], tuple[int, int]]:
        if border == 0:
            return x, (0, 0)
        above, below = self._neighbours(x, border)
        return jnp.concatenate([above, x, below], 1), (0, 0)

    def _neighbours(self, x: Float[Array, "B H W D"], border: int) -> tuple[Float[Array, "B border W D"], ...]:
        """Return the rows above and below; zeros where the image ends, which is what `ppermute` leaves there."""
        down = [(i, i + 1) for i in range(self.count - 1)]
        above = lax.ppermute(x[:, -border:], self.axis, down)
        below = lax.ppermute(x[:, :border], self.axis, [(i, j) for j, i in down])
        return above, below

    def coordinates(self, height: int, width: int) -> tuple[Float[Array, " H"], Float[np.ndarray, " W"]]:
        rows, cols = geometry.coordinates(height * self.count, width)
        return lax.dynamic_slice_in_dim(jnp.asarray(rows), self.index() * height, height), cols

    def pool_cells(self, x: Float[Array, "B H W D"], size: tuple[int, int]) -> Float[Array, "B h w D"]:
        height = x.shape[1]
        index, weights = geometry.pool_bins(height * self.count, size[0])
        shares = np.zeros((size[0], height * self.count), np.float32)
        np.add.at(shares, (np.arange(size[0])[:, None], index), weights)
        shares = lax.dynamic_slice_in_dim(jnp.asarray(shares), self.index() * height, height, 1)
        pooled = _pool_axis(x, size[1], 2).astype(jnp.float32)
        pooled = jnp.einsum("hH,bHwd->bhwd", shares, pooled, precision=lax.Precision.HIGHEST)
        return lax.psum(pooled, self.axis).astype(x.dtype)


WHOLE = Whole()


def adaptive_average_pool(x: Float[Array, "B H W D"], size: tuple[int, int]) -> Float[Array, "B h w D"]:
    """Average over `size` bins an axis, [floor(i H / h), ceil((i + 1) H / h)); also upwards, where bins overlap."""
    return _pool_axis(_pool_axis(x, size[0], 1), size[1], 2)


def _pool_axis(x: Float[Array, "B H W D"], out: int, axis: int) -> Float[Array, "B h w D"]:
    size = x.shape[axis]
    if size == out:
        return x
    if size % out == 0:
        shape = (*x.shape[:axis], out, size // out, *x.shape[axis + 1 :])
        return x.reshape(shape).mean(axis + 1, dtype=jnp.float32).astype(x.dtype)
    index, weights = geometry.pool_bins(size, out)
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    taps = (jnp.take(x, i, axis).astype(jnp.float32) * w.reshape(shape) for i, w in zip(index.T, weights.T))
    return functools.reduce(jnp.add, taps).astype(x.dtype)
