"""One contract for every backend of both frameworks: values and gradients against the definition in float64.

Triton decides whether it interprets when a kernel is defined. So the cases of `triton` are collected only in a process
with TRITON_INTERPRET=1, which `test_interpreted_triton` starts.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyup_jax.attention
import anyup_torch.attention
from anyup_core.geometry import AxisWindow, axis_window, kernel_window
from anyup_torch.attention.natten import installed

TOLERANCE = 2e-6  # float32 sums of a few hundred terms of order 1
GRADIENT_TOLERANCE = 2e-5  # relative to the largest entry
HALF_TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3}  # 8 and 11 bits of mantissa on values of order 1


class Shape(NamedTuple):
    output: tuple[int, int]
    cells: tuple[int, int]
    channels: int = 6
    batch: int = 1
    heads: int = 2
    ratio: float = 0.2
    dim: int = 16
    chunk: int | None = None


SHAPES = {
    "square": Shape((24, 24), (6, 6)),
    "prime_sizes": Shape((23, 17), (5, 3), dim=32),
    "one_row_of_cells": Shape((6, 20), (1, 5)),
    "one_column_of_cells": Shape((20, 6), (5, 1)),
    "one_cell": Shape((6, 7), (1, 1), channels=3),
    "one_channel_one_head": Shape((11, 7), (5, 3), channels=1, heads=1, dim=64, ratio=0.25),
    "c40": Shape((12, 18), (4, 6), channels=40, batch=2, dim=32, ratio=0.3),
    "c129": Shape((12, 12), (4, 4), channels=129),
    "batch_of_three": Shape((12, 15), (4, 5), batch=3),
    "c385": Shape((9, 13), (3, 4), channels=385, heads=4, dim=128),
    "head_of_20": Shape((8, 10), (4, 5), heads=3, dim=60),
    "every_key": Shape((12, 12), (5, 4), ratio=0.0, heads=1, chunk=64),
    "fractional_ratio": Shape((25, 31), (9, 8), ratio=0.1),
    "single_query_a_cell": Shape((7, 7), (7, 7), ratio=0.3),
    "no_dilation": Shape((7, 9), (5, 7), heads=1, dim=8),
    "window_larger_than_a_phase": Shape((5, 9), (2, 2), ratio=0.4),
    "wide_window": Shape((18, 18), (6, 6), ratio=0.8),
    "output_smaller_than_cells": Shape((5, 6), (10, 12)),
    "one_query": Shape((1, 1), (3, 3), ratio=0.5),
    "one_query_a_chunk": Shape((3, 5), (2, 2), channels=1, chunk=1),
    "chunk_of_7": Shape((6, 7), (3, 4), batch=2, chunk=7),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PORTABLE = [("jax", name) for name in anyup_jax.attention.PORTABLE] + [
    ("torch", name) for name in anyup_torch.attention.PORTABLE
]
# the kernels for TPU run in their interpreter, which is chosen at the call; NATTEN has an implementation for CPUs
EVERY = [*PORTABLE, ("jax", "pallas_tpu"), ("torch", "natten")]
if INTERPRETED:
    EVERY = PORTABLE = [("torch", "triton")]


def case(framework: str, backend: str, *rest: str) -> Any:
    missing = pytest.mark.skipif(backend == "natten" and not installed(), reason="natten is not installed")
    return pytest.param(framework, backend, *rest, id="-".join((framework, backend, *rest)), marks=missing)


def cases(names: Iterable[str]) -> pytest.MarkDecorator:
    """Every backend with the shapes and windows that it computes; NATTEN's window has at least one query a cell."""
    return pytest.mark.parametrize(
        ("framework", "backend", "name", "window"),
        [
            case(framework, backend, name, window)
            for framework, backend in EVERY
            for name in names
            for window in ("paper", "natten")
            if (backend != "natten" if window == "paper" else np.greater_equal(*SHAPES[name][:2]).all())
        ],
    )


portable = pytest.mark.parametrize(("framework", "backend"), [case(*backend) for backend in PORTABLE])


def windows(shape: Shape, window: str) -> tuple[AxisWindow, AxisWindow]:
    rows, cols = (axis_window(n, m, shape.ratio, window) for n, m in zip(shape.output, shape.cells))
    return rows, cols


def arrays(shape: Shape) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes = (*shape.output, shape.dim), (*shape.cells, shape.dim), (*shape.cells, shape.channels)
    return [random.standard_normal((shape.batch, *size), dtype=np.float32) for size in sizes]


def torch_inputs(name: str, window: str) -> tuple[list[torch.Tensor], tuple[AxisWindow, AxisWindow], dict[str, Any]]:
    """Return queries, keys and values, the windows, and the other arguments of `window_attention`."""
    shape = SHAPES[name]
    tensors = [torch.from_numpy(array) for array in arrays(shape)]
    return tensors, windows(shape, window), dict(num_heads=shape.heads, q_chunk_size=shape.chunk)


def attend(framework: str, backend: str, inputs: list, rows: AxisWindow, cols: AxisWindow, **options: Any) -> Any:
    module = anyup_jax.attention if framework == "jax" else anyup_torch.attention
    convert = jnp.asarray if framework == "jax" else torch.as_tensor
    if backend == "pallas_tpu":
        return module.pallas_tpu(*map(convert, inputs), rows, cols, interpret=True, **options)
    return module.window_attention(*map(convert, inputs), rows, cols, backend=backend, **options)


def definition(query: torch.Tensor, key: torch.Tensor, values: torch.Tensor, rows, cols, heads: int) -> torch.Tensor:
    """Window attention in float64, query by query."""
    dim = query.shape[-1] // heads
    count = torch.from_numpy(np.einsum("ih,jw->ijhw", rows.dense(), cols.dense())).double()
    output = torch.zeros(*query.shape[:3], values.shape[-1], dtype=torch.float64)
    for b, i, j in np.ndindex(*query.shape[:3]):
        seen = count[i, j] > 0
        weights = 0
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            scores = key[b, :, :, part][seen] @ query[b, i, j, part] / dim**0.5
            terms = count[i, j][seen] * torch.exp(scores - scores.max())
            weights = weights + terms / terms.sum() / heads
        output[b, i, j] = weights @ values[b][seen]
    return output


@functools.cache
def expected(name: str, window: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return the output by definition, a cotangent, and the gradients for queries, keys and values."""
    shape = SHAPES[name]
    exact = [torch.from_numpy(array).double().requires_grad_() for array in arrays(shape)]
    output = definition(*exact, *windows(shape, window), shape.heads)
    cotangent = np.random.default_rng(1).standard_normal(output.shape).astype(np.float32)
    gradients = torch.autograd.grad(output, exact, torch.from_numpy(cotangent).double())
    return output.detach().numpy(), cotangent, [x.numpy() for x in gradients]


def values_and_gradients(framework: str, call: Any, inputs: list[np.ndarray], cotangent: np.ndarray) -> Any:
    if framework == "jax":

        @jax.jit
        def program(cotangent, *inputs):
            result, pull = jax.vjp(call, *inputs)
            return result, pull(cotangent)

        return program(cotangent, *inputs)
    leaves = [torch.from_numpy(array).requires_grad_() for array in inputs]
    result = call(*leaves)
    return result.detach(), torch.autograd.grad(result, leaves, torch.from_numpy(cotangent))


def check(actual: Any, output: np.ndarray, gradients: Iterable[np.ndarray]) -> None:
    values, actual_gradients = actual
    assert values.shape == output.shape
    np.testing.assert_allclose(np.asarray(values), output, rtol=0, atol=TOLERANCE)
    for ours, exact in zip(actual_gradients, gradients, strict=True):
        scale = max(np.abs(exact).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(ours) / scale, exact / scale, rtol=0, atol=GRADIENT_TOLERANCE)


class TestContract:
    """Every backend computes the definition, whatever the shape."""

    @cases(SHAPES)
    def test_values_and_gradients(self, framework: str, backend: str, name: str, window: str) -> None:
        shape, (output, cotangent, gradients) = SHAPES[name], expected(name, window)
        options = dict(num_heads=shape.heads, q_chunk_size=shape.chunk)
        rows, cols = windows(shape, window)

        def call(*inputs):
            return attend(framework, backend, inputs, rows, cols, **options)

        check(values_and_gradients(framework, call, arrays(shape), cotangent), output, gradients)


HEADED = Shape((12, 15), (4, 5), channels=12, batch=2, heads=4)
WINDOWS: dict[str, Callable[[int, int], AxisWindow]] = {
    "paper": lambda n, m: axis_window(n, m, HEADED.ratio),
    "natten": lambda n, m: axis_window(n, m, HEADED.ratio, "natten"),
    "every_key": lambda n, m: axis_window(n, m, 0.0),
    "kernel": lambda n, m: kernel_window(n, m, 3),
}


@portable
@pytest.mark.parametrize("window", WINDOWS)
def test_values_per_head(framework: str, backend: str, window: str) -> None:
    """Heads are folded into the batch before a backend is called, whichever it is."""
    rows, cols = (WINDOWS[window](n, m) for n, m in zip(HEADED.output, HEADED.cells))
    exact = [torch.from_numpy(array).double().requires_grad_() for array in arrays(HEADED)]
    heads = zip(*(x.chunk(HEADED.heads, -1) for x in exact))
    output = torch.cat([definition(*head, rows, cols, 1) for head in heads], -1)
    cotangent = np.random.default_rng(1).standard_normal(output.shape).astype(np.float32)
    gradients = torch.autograd.grad(output, exact, torch.from_numpy(cotangent).double())

    def call(*inputs):
        options = dict(num_heads=HEADED.heads, values_per_head=True, q_chunk_size=HEADED.chunk)
        return attend(framework, backend, inputs, rows, cols, **options)

    actual = values_and_gradients(framework, call, arrays(HEADED), cotangent)
    check(actual, output.detach().numpy(), [x.numpy() for x in gradients])
    if framework == "torch":
        with torch.no_grad():
            whole = np.asarray(call(*arrays(HEADED)))
        np.testing.assert_allclose(whole, output.detach().numpy(), rtol=0, atol=TOLERANCE)
    query, key, values = arrays(HEADED)
    with pytest.raises(ValueError, match="num_heads=4"):
        call(query, key, values[..., 1:])


@portable
@pytest.mark.parametrize("chunk", [1, 7, np.int64(7), 20, 10**9])
def test_chunk_never_changes_the_result(unchecked, framework: str, backend: str, chunk: int) -> None:
    shape = SHAPES["window_larger_than_a_phase"]
    rows, cols = windows(shape, "paper")
    whole, parts = (
        np.asarray(attend(framework, backend, arrays(shape), rows, cols, num_heads=2, q_chunk_size=size))
        for size in (None, chunk)
    )
    np.testing.assert_allclose(parts, whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_tiles_are_planned_with_the_chunk(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"anyup_{framework}.attention.tiled")
    asked, plan = [], module.plan_tiles
    monkeypatch.setattr(
        module, "plan_tiles", lambda rows, cols, chunk, *rest: asked.append(chunk) or plan(rows, cols, chunk, *rest)
    )
    shape = SHAPES["square"]
    attend(framework, "auto", arrays(shape), *windows(shape, "paper"), num_heads=2, q_chunk_size=7)
    assert asked == [7]


def of_type(framework: str, array: np.ndarray, dtype: str) -> Any:
    return jnp.asarray(array, dtype) if framework == "jax" else torch.from_numpy(array).to(getattr(torch, dtype))


@pytest.mark.parametrize("kinds", [("bfloat16",) * 3, ("float16",) * 3, ("float32", "float32", "bfloat16")], ids=str)
@cases(["prime_sizes"])
def test_half_precision(framework: str, backend: str, name: str, window: str, kinds: tuple[str, ...]) -> None:
    shape, exact = SHAPES[name], expected(name, window)[0]
    inputs = [of_type(framework, array, kind) for array, kind in zip(arrays(shape), kinds)]
    output = attend(framework, backend, inputs, *windows(shape, window), num_heads=shape.heads)
    assert str(output.dtype).endswith(kinds[-1])
    output = output.astype(jnp.float32) if framework == "jax" else output.float()
    np.testing.assert_allclose(np.asarray(output), exact, rtol=0, atol=HALF_TOLERANCE[kinds[-1]])


@portable
def test_keys_outside_the_window_have_no_influence(framework: str, backend: str) -> None:
    rows, cols = windows(Shape((8, 8), (8, 8), ratio=0.1), "paper")
    query, key, values = arrays(Shape((8, 8), (8, 8)))
    loud, far = key.copy(), values.copy()
    loud[:, 4:], far[:, 4:] = 1e3, 1e6
    seen = rows.dense()[:, 4:].sum(1) == 0  # queries that see none of the changed rows
    assert seen.any()
    quiet, noisy = (
        np.asarray(attend(framework, backend, inputs, rows, cols, num_heads=2))[:, seen]
        for inputs in ([query, key, values], [query, loud, far])
    )
    np.testing.assert_array_equal(noisy, quiet)


@portable
def test_extreme_logits_pick_one_key(framework: str, backend: str) -> None:
    shape = SHAPES["square"]
    rows, cols = windows(shape, "paper")
    query, key, values = arrays(shape)
    output = np.asarray(attend(framework, backend, [1e3 * query, 1e3 * key, values], rows, cols, num_heads=1))
    assert np.isfinite(output).all()
    distance = np.abs(output[:, :, :, None, None] - values[:, None, None]).max(-1).min((-1, -2))
    assert distance.max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"backend": "none"}, "none.*auto, dense"),
        ({"q_chunk_size": 0}, "q_chunk_size=0"),
        ({"rows": axis_window(5, 6, 0.2)}, "5 x 24.*6 x 6"),
        ({"values": np.zeros((1, 6, 5, 6), np.float32)}, "6, 5, 6"),
        ({"key": np.zeros((2, 6, 6, 16), np.float32)}, "2, 6, 6, 16"),
        ({"key": np.zeros((1, 6, 6, 8), np.float32)}, "1, 6, 6, 8"),
    ],
)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_errors(framework: str, changes: dict, fields: str) -> None:
    shape = SHAPES["square"]
    rows, cols = windows(shape, "paper")
    query, key, values = arrays(shape)
    call = {"query": query, "key": key, "values": values, "rows": rows, "cols": cols, "backend": "auto"} | changes
    inputs = [call.pop(name) for name in ("query", "key", "values")]
    with pytest.raises(ValueError, match=fields):
        attend(framework, call.pop("backend"), inputs, call.pop("rows"), call.pop("cols"), num_heads=2, **call)


if not INTERPRETED:

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
    def test_interpreted_triton() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "torch-triton", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 2 * len(SHAPES)
