"""Upsamplers behind one interface: `method(image, features, size, values) -> features` at that size.

Every method averages values with weights that depend on the image and on the features but not on the values. So a
linear head may be applied before it, and the weights can be kept, see `evaluation.kept_weights`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import anyup_jax
from anyup_core.geometry import AxisWindow, axis_window
from anyup_core.preprocessing import IMAGENET
from anyup_core.resample import axis_weights
from evaluation.config import Config, Size

Guide = Float[Array, "B H W 3"] | Int[Array, "B H W 1"]
Maps = Mapping[str, tuple[Float[Array, "B h w C"], Float[Array, "B h w E"]]]


@runtime_checkable
class Method(Protocol):
    """An upsampler to evaluate.

    Attributes:
        name: its name on the command line.
        enlarge: how many times larger the image is that the encoder sees than for the other methods.
        guided_by: what it is given as `image`: "image", or "labels" (B, H, W, 1), integers from 0 to 255.
    """

    name: str
    enlarge: int
    guided_by: ClassVar[str]

    def __call__(
        self,
        image: Guide,
        features: Float[Array, "B h w C"],
        size: Size,
        values: Float[Array, "B h w E"] | None = None,
    ) -> Float[Array, "B Ho Wo E"]:
        """Return the features, or `values` instead of them, at another size; the image has values in [0, 1]."""
        ...

    def upsample_many(self, image: Guide, maps: Maps, size: Size) -> dict[str, Float[Array, "B Ho Wo E"]]:
        """Do the same for several pairs of features and values of one image."""
        return {name: self(image, features, size, values) for name, (features, values) in maps.items()}

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow] | None:
        """Which cells an output position averages; None where that does not depend on the image."""
        ...


def create(name: str, config: Config) -> Method:
    """Return a method by its name.

    Raises:
        ValueError, OSError, ConnectionError: for weights that cannot be loaded, as `anyup_jax.from_pretrained` does.
    """
    if name == "anyup":
        settings = config.anyup
        options: dict[str, Any] = {} if settings.window is None else dict(window=settings.window)
        if settings.ema:
            options["ema"] = True
        return Upsampler(anyup_jax.from_pretrained(settings.weights, dtype=jnp.dtype(settings.dtype), **options))
    if name == "joint_bilateral":
        return JointBilateral()
    if name == "label_guided":
        return LabelGuided()
    if name == "high_resolution":
        return Interpolation(name, "bilinear", config.high_resolution)
    return Interpolation(name, name)


@dataclasses.dataclass(frozen=True)
class Interpolation(Method):
    """Separable interpolation with the conventions of PyTorch's `interpolate`, which the published tables use.

    Attributes:
        kernel: "nearest" (nearest-exact), "bilinear" or "bicubic" (a = -0.75), the last two without aligned corners.
    """

    name: str
    kernel: str
    enlarge: int = 1
    guided_by: ClassVar[str] = "image"

    def __call__(self, image, features, size, values=None):
        values = features if values is None else values
        rows, cols = (jnp.asarray(axis_weights(self.kernel, n, m)) for n, m in zip(values.shape[1:3], size))
        return jnp.einsum("Hh,bhwc,Ww->bHWc", rows, values, cols, precision="highest")

    def windows(self, cells: Size, size: Size) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class JointBilateral(Method):
    """Joint bilateral upsampling (Kopf et al., 2007), which needs no training.

    A position averages the cells around it, weighted by their distance and by how much its colour differs from the mean
    colour of the cell.

    Attributes:
        radius: cells on either side.
        spatial: standard deviation of the distance, in cells.
        range: standard deviation of the difference of colours in [0, 1].
    """

    name: str = "joint_bilateral"
    enlarge: int = 1
    guided_by: ClassVar[str] = "image"
    radius: int = 2
    spatial: float = 1.0
    range: float = 0.1

    def __call__(self, image, features, size, values=None):
        values = features if values is None else values
        cells = values.shape[1:3]
        guide = image if image.shape[1:3] == size else jax.image.resize(
            image, (len(image), *size, 3), "bilinear", antialias=True
        )  # fmt: skip
        coarse = jax.image.resize(image, (len(image), *cells, 3), "bilinear", antialias=True)
        rows, cols = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(size, cells))

        def weigh(i, j):
            distance = jnp.square(rows - i)[:, None] + jnp.square(cols - j)[None]
            colour = jnp.square(guide - coarse[:, i][:, :, j]).sum(-1)
            return jnp.exp(-0.5 * (distance / self.spatial**2 + colour / self.range**2))

        return _average(values, self.windows(cells, size), weigh, least=1e-30)

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow]:
        """Cells within the radius, moved inwards at the edges."""
        return tuple(self._axis(n, m) for n, m in zip(size, cells))

    def _axis(self, size: int, cells: int) -> AxisWindow:
        span = min(2 * self.radius + 1, cells)
        nearest = np.floor((np.arange(size) + 0.5) * cells / size).astype(np.int32)
        start = (nearest - self.radius).clip(0, cells - span).astype(np.int32)
        return AxisWindow(cells, start, np.ones((size, span), np.int32))


@dataclasses.dataclass(frozen=True)
class LabelGuided(Method):
    """Upsampling with the labels known: an upper bound to compare with, not a method.

    A position averages the cells of AnyUp's window, each weighted by how many of its pixels have the position's label.
    So nothing is mixed across an edge that the cells do not mix already.

    Attributes:
        window_ratio: of the window, as in `AnyUpConfig`.
    """

    name: str = "label_guided"
    enlarge: int = 1
    window_ratio: float = 0.1
    guided_by: ClassVar[str] = "labels"

    def __call__(self, image, features, size, values=None):
        if image.shape[1:3] != size:
            raise ValueError(f"Labels of {image.shape[1:3]} cannot guide an output of {size}; give labels of its size.")
        return _label_guided(self, image[..., 0], features if values is None else values, size)

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow]:
        return tuple(axis_window(n, m, self.window_ratio, "paper") for n, m in zip(size, cells))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _label_guided(method, labels, values, size):
    batch, height, width, _ = values.shape
    rows, cols = (np.arange(n) * m // n for n, m in zip(size, (height, width)))
    images = jnp.arange(batch)[:, None, None]
    counts = jnp.zeros((batch, height, width, 256)).at[images, rows[:, None], cols, labels].add(1)
    return _average(values, method.windows((height, width), size), lambda i, j: counts[images, i[:, None], j, labels])


def _average(
    values: Float[Array, "B h w E"],
    windows: tuple[AxisWindow, AxisWindow],
    weigh: Callable[[Int[Array, " Ho"], Int[Array, " Wo"]], Float[Array, "B Ho Wo"]],
    least: float = 0.0,
) -> Float[Array, "B Ho Wo E"]:
    """Average the cells of every position's window.

    Args:
        values: of the cells.
        windows: of rows and columns.
        weigh: takes a row of cells for each row of positions and a column of cells for each column of positions;
            returns the weights of the cells where they meet.
        least: added to the sum of the weights, where that can be 0.
    """
    tall, wide = windows
    span = wide.count.shape[1]

    def add(sums, offset):  # one cell of every window at a time: memory for one map of values
        row, col = offset // span, offset % span
        i, j = jnp.asarray(tall.start) + row, jnp.asarray(wide.start) + col
        seen = jnp.asarray(tall.count)[:, row, None] * jnp.asarray(wide.count)[:, col]
        weight = seen * weigh(i, j)  # beyond the last cell it is that of the last, seen 0 times
        total, weights = sums
        return (total + weight[..., None] * values[:, i][:, :, j], weights + weight), None

    total = jnp.zeros((len(values), len(tall.start), len(wide.start), values.shape[-1]), values.dtype)
    sums = total, jnp.full(total.shape[:3], least)
    (total, weights), _ = jax.lax.scan(add, sums, jnp.arange(tall.count.shape[1] * span))
    return total / weights[..., None]


@dataclasses.dataclass(frozen=True)
class Upsampler(Method):
    """AnyUp."""

    model: anyup_jax.AnyUp
    name: str = "anyup"
    enlarge: int = 1
    guided_by: ClassVar[str] = "image"

    def __call__(self, image, features, size, values=None):
        return anyup_jax.upsample(self.model, self._guidance(image), features, size, values=values)

    def upsample_many(self, image, maps, size):
        """Encode the image once for all maps."""
        features, values = zip(*maps.values())
        return dict(zip(maps, anyup_jax.upsample_many(self.model, self._guidance(image), features, size, None, values)))

    def _guidance(self, image):
        mean, std = (jnp.asarray(x, jnp.float32) for x in IMAGENET)
        return (image - mean) / std

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow]:
        config = self.model.config
        return tuple(axis_window(n, m, config.window_ratio, config.window) for n, m in zip(size, cells))
