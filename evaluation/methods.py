"""Upsamplers behind one interface: `method(image, features, size, values) -> features` at that size.

Every method averages values with weights that depend on the image and on the features but not on the values. So a
linear head may be applied before it, and the weights can be kept, see `evaluation.kept_weights`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import anyup_jax
from anyup_core.geometry import AxisWindow, axis_window
from anyup_core.preprocessing import IMAGENET
from anyup_core.resample import axis_weights
from anyup_core.settings import require
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
    enlarge: int = 1
    guided_by: str = "image"

    def __call__(
        self, image: Guide, features: Float[Array, "B h w C"], size: Size, values: Float[Array, "B h w E"] | None = None
    ) -> Float[Array, "B Ho Wo E"]:
        """Return the features, or `values` instead of them, at another size; the image has values in [0, 1]."""
        ...

    def upsample_many(self, image: Guide, maps: Maps, size: Size) -> dict[str, Float[Array, "B Ho Wo E"]]:
        """Return the output for each of several pairs of features and values of one image, by its name."""
        return {name: self(image, features, size, values) for name, (features, values) in maps.items()}

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow] | None:
        """Return which cells an output position averages; None where the weights do not depend on the image."""
        return None


def create(name: str, config: Config) -> Method:
    """Return a method by its name.

    Raises:
        ValueError, OSError, ConnectionError: if weights cannot be loaded, as `anyup_jax.from_pretrained` does; and
            ValueError for a model whose guidance is no photograph.
    """
    if name == "anyup":
        settings = config.anyup
        options = {key: value for key, value in dict(window=settings.window, ema=settings.ema).items() if value}
        model = anyup_jax.from_pretrained(settings.weights, dtype=jnp.dtype(settings.dtype), **options)
        remedy = f"its guidance has {model.config.input_dim} channels, and images here have 3"
        require(model.config.input_dim == 3, "anyup.weights", settings.weights, remedy)
        return Upsampler(model)
    if name == "high_resolution":
        return Interpolation(name, "bilinear", config.high_resolution)
    guided = {method.name: method for method in (JointBilateral(), LabelGuided())}
    return guided.get(name) or Interpolation(name, name)


def resize(x: Float[Array, "B H W C"], size: Size, kernel: str) -> Float[Array, "B Ho Wo C"]:
    """Interpolate as PyTorch does without aligned corners and antialiasing; the map itself where the size is its own.

    Args:
        x: the map.
        size: height and width of the result.
        kernel: "nearest", "bilinear" or "bicubic", see `anyup_core.resample.axis_weights`.
    """
    if x.shape[1:3] == tuple(size):
        return x
    rows, cols = (jnp.asarray(axis_weights(kernel, n, m), x.dtype) for n, m in zip(x.shape[1:3], size))
    return jnp.einsum("Hh,bhwc,Ww->bHWc", rows, x, cols, precision="highest")


@dataclasses.dataclass(frozen=True)
class Interpolation(Method):
    """Separable interpolation with the conventions of PyTorch's `interpolate`, which the published tables use.

    Attributes:
        kernel: "nearest" (nearest-exact), "bilinear" or "bicubic" (a = -0.75), the last two without aligned corners.
    """

    name: str
    kernel: str
    enlarge: int = 1

    def __call__(self, image, features, size, values=None):
        return resize(features if values is None else values, size, self.kernel)


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

    name: ClassVar[str] = "joint_bilateral"
    radius: int = 2
    spatial: float = 1.0
    range: float = 0.1

    def __call__(self, image, features, size, values=None):
        values = features if values is None else values
        cells = values.shape[1:3]
        shapes = ((len(image), *side, 3) for side in (size, cells))
        guide, coarse = (jax.image.resize(image, shape, "bilinear", antialias=True) for shape in shapes)
        rows, cols = ((np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(size, cells))

        def weigh(i, j):
            distance = jnp.square(rows - i)[:, None] + jnp.square(cols - j)[None]
            colour = jnp.square(guide - coarse[:, i][:, :, j]).sum(-1)
            return jnp.exp(-0.5 * (distance / self.spatial**2 + colour / self.range**2))

        return _average(values, self.windows(cells, size), weigh, least=1e-30)

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow]:
        """Return the cells within the radius, moved inwards at the edges."""

        def axis(n: int, m: int) -> AxisWindow:
            span = min(2 * self.radius + 1, m)
            nearest = np.floor((np.arange(n) + 0.5) * m / n).astype(np.int32)
            return AxisWindow(m, (nearest - self.radius).clip(0, m - span), np.ones((n, span), np.int32))

        return axis(size[0], cells[0]), axis(size[1], cells[1])


@dataclasses.dataclass(frozen=True)
class LabelGuided(Method):
    """Upsampling with the labels known: an upper bound to compare with, not a method.

    A position averages the cells of AnyUp's window, each weighted by how many of its pixels have the position's label.
    So nothing is mixed across an edge that the cells do not mix already.

    Attributes:
        window_ratio: of the window, as in `AnyUpConfig`.
    """

    name: ClassVar[str] = "label_guided"
    guided_by: ClassVar[str] = "labels"
    window_ratio: float = 0.1

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

    name: ClassVar[str] = "anyup"
    model: anyup_jax.AnyUp

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
