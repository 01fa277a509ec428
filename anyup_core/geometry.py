"""Where things are: windows, coordinates, pooling bins and tiles, as numpy tables made once on the host.

Kernels receive these tables and never a ratio: the window bounds are only exact when computed in numpy float32, in the
order of operations used here.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class AxisWindow:
    """Which keys the queries see along one axis.

    Attributes:
        keys: number n of keys along the axis.
        start: int32, first key of each query's slice; `start + span <= keys`.
        count: int32, how often a query sees key `start + j`: 0 outside its window.
        neighbourhood: what the table was made from, where it is the whole of a `window="natten"`.
    """

    keys: int
    start: Int[np.ndarray, " queries"]
    count: Int[np.ndarray, "queries span"]
    neighbourhood: Neighbourhood | None = None

    @property
    def queries(self) -> int:
        return len(self.start)

    @property
    def span(self) -> int:
        return self.count.shape[1]

    def dense(self) -> Int[np.ndarray, "queries keys"]:
        """Return the whole table, int32: how often each query sees each key."""
        table = np.zeros((self.queries, self.keys), np.int32)
        columns = self.start[:, None] + np.arange(self.span)
        np.put_along_axis(table, columns, self.count, axis=1)
        return table

    @classmethod
    def from_dense(cls, table: Int[np.ndarray, "queries keys"]) -> AxisWindow:
        """Build from a table in which every query sees at least one key."""
        seen = table > 0
        first = seen.argmax(1)
        stop = table.shape[1] - seen[:, ::-1].argmax(1)
        span = int((stop - first).max())
        start = np.minimum(first, table.shape[1] - span)
        columns = start[:, None] + np.arange(span)
        return cls(table.shape[1], start.astype(np.int32), np.take_along_axis(table, columns, 1).astype(np.int32))


def paper_bounds(queries: int, keys: int, ratio: float) -> Int[np.ndarray, "queries 2"]:
    """Return the half-open key bounds of the paper's window along one axis, int32.

    Query i at y = (i + 1/2) / queries sees keys [floor(clip(y - r, 0, 1) n), ceil(clip(y + r, 0, 1) n)) (paper,
    section 3).

    Raises:
        ValueError: if the ratio is so small that a query would see no key.
    """
    if ratio <= 0:
        return np.tile(np.array([0, keys], np.int32), (queries, 1))
    centre = (np.arange(queries, dtype=np.float32) + np.float32(0.5)) / np.float32(queries)
    radius, zero, one = np.float32(ratio), np.float32(0), np.float32(1)
    low = np.floor(np.clip(centre - radius, zero, one) * np.float32(keys))
    high = np.ceil(np.clip(centre + radius, zero, one) * np.float32(keys))
    if (high <= low).any():
        raise ValueError(
            f"window_ratio={ratio} is so small that some of {queries} queries see none of {keys} keys; "
            f"use at least {0.5 / keys:.3g}, or 0 to see every key."
        )
    return np.stack([low, high], 1).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Neighbourhood attention along one axis, over keys that are upsampled to the queries (nearest-exact).

    With dilation s = queries // keys, query i has phase i mod s and sees a kernel of consecutive positions of its phase
    around its own, shifted so that it stays inside; a phase shorter than the kernel is seen whole.

    Attributes:
        keys: number of keys before upsampling.
        source: int64, the key under every upsampled position.
        dilation, kernel: the distance of a phase's positions, and how many of them a query sees.
    """

    keys: int
    source: Int[np.ndarray, " queries"]
    dilation: int
    kernel: int

    def first(self, length: int) -> Int[np.ndarray, " length"]:
        """Return where the windows of a phase's positions begin, within the phase, int64."""
        size = min(self.kernel, length)
        return (np.arange(length) - size // 2).clip(0, length - size)

    def counts(self) -> Int[np.ndarray, "queries keys"]:
        """Return how often each query sees each key, int32.

        At a whole ratio every count is 0 or 1; elsewhere a key can occur several times.
        """
        table = np.zeros((len(self.source), self.keys), np.int32)
        for phase in range(self.dilation):
            cells = self.source[phase :: self.dilation]
            members = cells[self.first(len(cells))[:, None] + np.arange(min(self.kernel, len(cells)))]
            np.add.at(table, (phase + self.dilation * np.arange(len(cells))[:, None], members), 1)
        return table


def neighbourhood(queries: int, keys: int, ratio: float) -> Neighbourhood:
    """Return the published NATTEN variant's window along one axis.

    Raises:
        ValueError: if there are fewer queries than keys, where this window is not defined.
    """
    dilation = queries // keys
    if dilation < 1:
        raise ValueError(
            f'window="natten" needs an output at least as large as the features, got {queries} positions for {keys} '
            'features along one axis; use window="paper" or a larger output_size.'
        )
    kernel = keys
    if 0 < ratio < 0.5:
        kernel = max(3, round(2 * ratio * keys))
        kernel += kernel % 2 == 0
    return _dilated(queries, keys, dilation, kernel)


def _dilated(queries: int, keys: int, dilation: int, kernel: int) -> Neighbourhood:
    scale = np.float64(np.float32(keys) / np.float32(queries))
    source = np.floor(((np.arange(queries) + 0.5) * scale).astype(np.float32)).astype(np.int64).clip(0, keys - 1)
    return Neighbourhood(keys, source, dilation, kernel)


@functools.lru_cache(maxsize=256)
def kernel_window(queries: int, keys: int, kernel: int) -> AxisWindow:
    """Return a window like `window="natten"`, along one axis, with a kernel of a fixed number of cells, at most `keys`.

    There are at least as many queries as keys.
    """
    return _windowed(_dilated(queries, keys, queries // keys, kernel))


def _windowed(near: Neighbourhood) -> AxisWindow:
    return dataclasses.replace(AxisWindow.from_dense(near.counts()), neighbourhood=near)


@functools.lru_cache(maxsize=256)
def axis_window(queries: int, keys: int, ratio: float, window: str = "paper") -> AxisWindow:
    """Return the window along one axis for `queries` output positions over `keys` low-resolution positions."""
    if window == "natten":
        return _windowed(neighbourhood(queries, keys, ratio))
    low, high = paper_bounds(queries, keys, ratio).T
    span = int((high - low).max())
    start = np.minimum(low, keys - span).astype(np.int32)
    columns = start[:, None] + np.arange(span)
    inside = (columns >= low[:, None]) & (columns < high[:, None])
    return AxisWindow(keys, start, inside.astype(np.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class AxisTiles:
    """The queries of one axis cut into runs of equal length, each with one slice of keys that holds all their windows.

    Attributes:
        first: int32, first query of each run; the last run starts early enough to end with the last query.
        start: int32, first key of each run's slice.
        count: int32, as in `AxisWindow`, relative to the run's slice.
    """

    first: Int[np.ndarray, " runs"]
    start: Int[np.ndarray, " runs"]
    count: Int[np.ndarray, "runs size span"]

    @property
    def runs(self) -> int:
        return len(self.start)

    @property
    def size(self) -> int:
        return self.count.shape[1]

    @property
    def span(self) -> int:
        return self.count.shape[2]

    def bias(self) -> Float[np.ndarray, "runs size span"]:
        """Return the logarithm of how often a query sees a key, float32; minus infinity for never."""
        with np.errstate(divide="ignore"):
            return np.log(self.count.astype(np.float32))


def tile_axis(window: AxisWindow, size: int) -> AxisTiles:
    """Cut the queries of `window` into runs of `size`; the key slices all have the longest run's length."""
    first = np.minimum(np.arange(0, window.queries, size), window.queries - size).astype(np.int32)
    query = first[:, None] + np.arange(size)
    seen = window.count > 0
    low = (window.start + seen.argmax(1))[query].min(1)
    high = (window.start + window.span - seen[:, ::-1].argmax(1))[query].max(1)
    span = int((high - low).max())
    start = np.minimum(low, window.keys - span).astype(np.int32)
    offset = window.start[query] - start[:, None]  # may be negative where a query's own slice starts outside its window
    columns = np.arange(span) - offset[:, :, None]
    count = np.take_along_axis(window.count[query], columns.clip(0, window.span - 1), axis=2)
    count = np.where((columns >= 0) & (columns < window.span), count, 0)
    return AxisTiles(first, start, count)


@functools.lru_cache(maxsize=256)
def plan_tiles(
    rows: AxisWindow, cols: AxisWindow, queries: int | None = None, strips: int = 1
) -> tuple[AxisTiles, AxisTiles]:
    """Choose tiles of at most `queries` query positions (None: whatever is fastest) and cut both axes.

    No tile crosses the border between two of the `strips` equal strips of rows.

    Larger tiles have less overhead; smaller ones score fewer keys that no query of the tile sees. The cost of a tile is
    taken as its scored query-key pairs plus a constant of TILE_OVERHEAD pairs.
    """
    limit = MAX_TILE if queries is None else max(1, queries)
    best = None
    for height in _sizes(rows, limit):
        if strips > 1 and rows.queries // strips % height:
            continue
        tall = tile_axis(rows, height)
        for width in _sizes(cols, limit // height):
            wide = tile_axis(cols, width)
            pairs = height * width * tall.span * wide.span
            if pairs > MAX_PAIRS and height * width > 1:
                continue
            cost = tall.runs * wide.runs * (pairs + TILE_OVERHEAD)
            if best is None or cost < best[0]:
                best = cost, tall, wide
    assert best is not None  # a tile of one query is always allowed
    return best[1], best[2]


TILE_OVERHEAD = 16_000  # query-key pairs that take as long as starting a tile, on a CPU
MAX_TILE = 4096  # queries a tile
MAX_PAIRS = 1 << 20  # query-key pairs a tile: bounds the scores held at once


def _sizes(window: AxisWindow, limit: int) -> list[int]:
    """Return candidate run lengths within the limit: whole numbers of keys, divisors of the axis, powers of two."""
    ratio = max(1, window.queries // window.keys)
    sizes = {1, *(ratio * n for n in (1, 2, 3, 4, 6, 8)), *(1 << n for n in range(1, 7))}
    sizes |= {n for n in range(2, 97) if window.queries % n == 0}
    sizes.add(min(window.queries, limit))
    sizes = {size for size in sizes if size <= min(limit, window.queries)}
    return sorted(sizes or {1})


def coordinates(height: int, width: int) -> tuple[Float[np.ndarray, " height"], Float[np.ndarray, " width"]]:
    """Return row and column coordinates of the pixels in [0, 1], end points included, float32."""
    return np.linspace(0, 1, height, dtype=np.float32), np.linspace(0, 1, width, dtype=np.float32)


def rope_frequencies(dim: int, theta: float = 100.0) -> Float[np.ndarray, "2 dim"]:
    """Return initial rotary frequencies, float32: rows act on the first half of the channels, columns on the rest."""
    exponents = np.linspace(0, -1, dim // 4, dtype=np.float64)
    wave = np.tile(theta**exponents, 2)
    zeros = np.zeros_like(wave)
    return (2 * math.pi * np.stack([np.r_[wave, zeros], np.r_[zeros, wave]])).astype(np.float32)


@functools.lru_cache(maxsize=256)
def pool_bins(size: int, out: int) -> tuple[Int[np.ndarray, "out taps"], Float[np.ndarray, "out taps"]]:
    """Return the bins of an adaptive average pooling from `size` to `out` positions along one axis, also upwards.

    Output i averages inputs [floor(i size / out), ceil((i + 1) size / out)). Returns int32 indices and
    float32 weights; unused taps repeat an index with weight zero.
    """
    i = np.arange(out)
    first, stop = i * size // out, -(-(i + 1) * size // out)
    taps = np.arange((stop - first).max())
    inside = taps < (stop - first)[:, None]
    index = np.where(inside, first[:, None] + taps, first[:, None]).astype(np.int32)
    return index, (inside / (stop - first)[:, None]).astype(np.float32)


def reflection(size: int, border: int) -> Int[np.ndarray, " {size}+2*{border}"]:
    """Return int64 indices that extend an axis by `border` reflected positions at both ends.

    The reference cannot reflect an axis no longer than the border. Here the reflection goes on as often as needed, and
    a single position, which has nothing to reflect, is repeated.
    """
    return np.pad(np.arange(size), border, mode="reflect")


def taps_in_bounds(size: int, kernel: int) -> Float[np.ndarray, " size"]:
    """Return how many taps of a zero-padded kernel fall inside an axis, at every position, float32."""
    i = np.arange(size)
    half = kernel // 2
    return (np.minimum(i + half, size - 1) - np.maximum(i - half, 0) + 1).astype(np.float32)


def gaussian_derivatives(filters: int, kernel: int) -> Float[np.ndarray, "filters kernel kernel"]:
    """Return filters that start as derivatives of a Gaussian, float32.

    Filter (a, b) is the derivative of order a along rows and b along columns of a normal density whose 90 % interval is
    the kernel, scaled by sigma^(a+b): (-1)^n He_n(x / sigma) g(x) along each axis, He_n the Hermite polynomials.
    Orders ascend by a + b, then by b, up to the first total that gives enough filters.
    """
    radius = kernel // 2
    sigma = max(radius, 1) / 1.645
    x = (np.arange(kernel) - radius) / sigma
    density = np.exp(-(x**2) / 2) / (sigma * math.sqrt(2 * math.pi))
    orders = [(total - b, b) for total in range(filters) for b in range(total + 1)][:filters]
    hermite = np.polynomial.hermite_e.hermevander(x, sum(orders[-1])).T
    axis = [(-1) ** n * polynomial * density for n, polynomial in enumerate(hermite)]
    return np.stack([np.outer(axis[a], axis[b]) for a, b in orders]).astype(np.float32)
