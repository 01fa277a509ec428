"""The tables everything else relies on, against formulas written out slowly and against the reference's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from anyup_core import geometry
from anyup_core.geometry import AxisWindow, axis_window
from anyup_jax.pooling import adaptive_average_pool
from parity_tests.golden import GOLDEN, needs_golden

AXES = [
    (448, 32, 0.1),
    (37, 5, 0.1),
    (50, 8, 0.25),
    (10, 20, 0.1),
    (7, 7, 0.03),
    (1, 1, 0.1),
    (5, 1, 0.3),
    (56, 8, 0.0),
]


@needs_golden
def test_paper_bounds_are_the_references() -> None:
    bounds = load_file(GOLDEN / "window_bounds.safetensors")
    for name, expected in bounds.items():
        output, cells, ratio, axis = name.split("_")
        n, m = (int(size.split("x")[axis == "cols"]) for size in (output, cells))
        np.testing.assert_array_equal(geometry.paper_bounds(n, m, float(ratio)), expected, err_msg=name)


@pytest.mark.parametrize(("queries", "keys", "ratio"), AXES)
def test_paper_bounds_by_the_formula(queries: int, keys: int, ratio: float) -> None:
    f32 = np.float32
    for i, (low, high) in enumerate(geometry.paper_bounds(queries, keys, ratio)):
        y = (f32(i) + f32(0.5)) / f32(queries)
        expected = (0, keys)
        if ratio > 0:
            expected = (
                np.floor(min(max(y - f32(ratio), f32(0)), f32(1)) * f32(keys)),
                np.ceil(min(max(y + f32(ratio), f32(0)), f32(1)) * f32(keys)),
            )
        assert (low, high) == expected
        assert high > low


def test_too_small_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window_ratio=1e-09 is so small that some of 1 queries"):
        axis_window(1, 2, 1e-9)


def natten_oracle(queries: int, keys: int, ratio: float) -> np.ndarray:
    """Count, query by query, the upsampled keys of a dilated neighbourhood."""
    dilation = queries // keys
    kernel = keys if not 0 < ratio < 0.5 else max(3, round(2 * ratio * keys))
    kernel += kernel % 2 == 0 and 0 < ratio < 0.5
    cell = F.interpolate(torch.arange(keys).float()[None, None], queries, mode="nearest-exact")[0, 0].long().numpy()
    table = np.zeros((queries, keys), int)
    for query in range(queries):
        members = list(range(query % dilation, queries, dilation))
        size = min(kernel, len(members))
        start = min(max(members.index(query) - size // 2, 0), len(members) - size)
        for position in members[start : start + size]:
            table[query, cell[position]] += 1
    return table


@pytest.mark.parametrize(
    ("queries", "keys", "ratio"),
    [
        *[(112, 16, 0.1), (100, 16, 0.1), (90, 12, 0.1), (37, 5, 0.1), (9, 3, 0.1), (8, 2, 0.4), (30, 8, 0.5)],
        *[(31, 9, 0.0), (40, 10, 0.2), (64, 16, 0.25), (90, 20, 0.15), (37, 12, 0.1), (23, 14, 0.3)],
    ],
)
def test_natten_counts(queries: int, keys: int, ratio: float) -> None:
    expected = natten_oracle(queries, keys, ratio)
    np.testing.assert_array_equal(geometry.neighbourhood(queries, keys, ratio).counts(), expected)
    np.testing.assert_array_equal(axis_window(queries, keys, ratio, "natten").dense(), expected)


def test_natten_window_needs_an_output_as_large_as_the_features() -> None:
    with pytest.raises(ValueError, match='window="natten" needs an output at least as large'):
        axis_window(10, 20, 0.1, "natten")


@pytest.mark.parametrize(("queries", "keys", "ratio"), AXES)
def test_dense_table_round_trip(queries: int, keys: int, ratio: float) -> None:
    window = axis_window(queries, keys, ratio)
    assert (window.queries, window.keys) == (queries, keys)
    assert (window.start + window.span <= keys).all()
    np.testing.assert_array_equal(AxisWindow.from_dense(window.dense()).dense(), window.dense())


@pytest.mark.parametrize("window", ["paper", "natten"])
@pytest.mark.parametrize(("queries", "keys", "ratio"), [(448, 32, 0.1), (37, 5, 0.1), (50, 8, 0.25), (7, 7, 0.03)])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_tiles_hold_every_window(queries: int, keys: int, ratio: float, window: str, size: int) -> None:
    axis = axis_window(queries, keys, ratio, window)
    tiles = geometry.tile_axis(axis, size)
    assert tiles.first[-1] + size == queries
    assert set((tiles.first[:, None] + np.arange(size)).flatten()) == set(range(queries))
    for run in range(tiles.runs):
        rows = np.zeros((size, keys), int)
        rows[:, tiles.start[run] : tiles.start[run] + tiles.span] = tiles.count[run]
        np.testing.assert_array_equal(rows, axis.dense()[tiles.first[run] : tiles.first[run] + size])


@pytest.mark.parametrize("limit", [1, 2, 10, 100, 1000, None])
def test_tiles_respect_the_chunk(limit: int | None) -> None:
    rows, cols = axis_window(60, 12, 0.1), axis_window(37, 5, 0.1)
    tall, wide = geometry.plan_tiles(rows, cols, limit)
    assert tall.size * wide.size <= (limit or geometry.MAX_TILE)


def test_tiles_bound_the_scores_held_at_once() -> None:
    tall, wide = geometry.plan_tiles(axis_window(4096, 512, 0.0), axis_window(16, 16, 0.0))
    assert tall.size * wide.size * tall.span * wide.span <= geometry.MAX_PAIRS


def test_negative_ratio_sees_every_key() -> None:
    assert (axis_window(9, 4, -1.0).dense() == 1).all()


@pytest.mark.parametrize(("size", "out"), [(9, 4), (12, 4), (4, 9), (5, 5), (7, 1), (1, 3)])
def test_pool_bins(size: int, out: int) -> None:
    x = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(0))
    index, weights = geometry.pool_bins(size, out)
    pooled = (x[0, 0].numpy()[index] * weights).sum(1)
    np.testing.assert_allclose(pooled, F.adaptive_avg_pool1d(x, out)[0, 0].numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(4, 5), (3, 7), (24, 30), (12, 1)])
def test_adaptive_average_pool(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    ours = np.asarray(adaptive_average_pool(jnp.asarray(x.permute(0, 2, 3, 1).numpy()), size))
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), F.adaptive_avg_pool2d(x, size).numpy(), atol=1e-6)


@needs_golden
def test_pooling_is_the_references() -> None:
    arrays = load_file(GOLDEN / "resampling.safetensors")
    for size in ((130, 50), (7, 9)):
        ours = np.asarray(adaptive_average_pool(jnp.asarray(arrays["image"].transpose(0, 2, 3, 1)), size))
        expected = arrays[f"adaptive_avg_pool_{size[0]}x{size[1]}"]
        np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), expected, atol=1e-6)


def test_coordinates_and_frequencies() -> None:
    rows, cols = geometry.coordinates(5, 1)
    np.testing.assert_array_equal(rows, np.float32([0, 0.25, 0.5, 0.75, 1]))
    np.testing.assert_array_equal(cols, np.float32([0]))
    freqs = geometry.rope_frequencies(16)
    wave = 100.0 ** -(np.arange(4) / 3)
    np.testing.assert_allclose(freqs[0], 2 * np.pi * np.r_[wave, wave, np.zeros(8)], rtol=1e-6)
    np.testing.assert_allclose(freqs[1], 2 * np.pi * np.r_[np.zeros(8), wave, wave], rtol=1e-6)


@pytest.mark.parametrize(("size", "kernel"), [(9, 5), (2, 5), (1, 3), (6, 1)])
def test_taps_in_bounds(size: int, kernel: int) -> None:
    expected = np.convolve(np.ones(size), np.ones(kernel))[kernel // 2 :][:size]
    np.testing.assert_array_equal(geometry.taps_in_bounds(size, kernel), expected)


@pytest.mark.parametrize(
    ("size", "indices"), [(1, [0, 0, 0, 0, 0]), (2, [0, 1, 0, 1, 0, 1]), (3, [2, 1, 0, 1, 2, 1, 0])]
)
def test_reflection(size: int, indices: list[int]) -> None:
    np.testing.assert_array_equal(geometry.reflection(size, 2), indices)


@needs_golden
@pytest.mark.parametrize(("name", "kernel"), [("basis_k5_order15", 5), ("basis_k3_order13", 3)])
def test_gaussian_derivatives_are_the_references(name: str, kernel: int) -> None:
    expected = load_file(GOLDEN / "gaussian_derivative_basis.safetensors")[name]
    error = np.abs(geometry.gaussian_derivatives(len(expected), kernel) - expected).max((1, 2))
    assert (error <= 1e-5 * np.abs(expected).max((1, 2))).all()
