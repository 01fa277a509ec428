"""One contract for every PyTorch backend: values and gradients against `dense`, over one table of shapes.

Triton decides whether it interprets when a kernel is defined. So the checks of `triton` are collected only in a process
with TRITON_INTERPRET=1, which `test_interpreted_triton` starts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from anyup_core.geometry import AxisWindow, axis_window
from anyup_torch.attention import BACKENDS, window_attention
from anyup_torch.attention.natten import installed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHECKED = ("triton",) if INTERPRETED else tuple(name for name in BACKENDS if name not in ("dense", "triton"))
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GRADIENT_TOLERANCE = 2e-5  # relative to the largest entry


@dataclasses.dataclass(frozen=True)
class Shape:
    output: tuple[int, int]
    cells: tuple[int, int]
    channels: int = 5
    batch: int = 1
    heads: int = 2
    head_dim: int = 16
    ratio: float = 0.3
    chunk: int | None = None
    windows: tuple[str, ...] = ("paper", "natten")


SHAPES = {
    "square": Shape((16, 16), (4, 4), heads=4, head_dim=32),
    "prime_sizes": Shape((13, 17), (5, 6)),
    "one_row_of_cells": Shape((6, 20), (1, 5), 3, head_dim=8, ratio=0.2),
    "one_cell": Shape((6, 7), (1, 1), 3, head_dim=8, ratio=0.2, windows=("natten",)),
    "one_channel_one_head": Shape((11, 7), (5, 3), 1, heads=1, head_dim=64, ratio=0.25),
    "many_channels": Shape((9, 10), (4, 4), 385, heads=4, head_dim=32, ratio=0.25, windows=("paper",)),
    "chunks_of_values": Shape((12, 18), (4, 6), 40, batch=2),
    "odd_head": Shape((8, 10), (4, 5), heads=3, head_dim=20, ratio=0.2),
    "kernel_larger_than_a_phase": Shape((5, 9), (2, 2), 3, head_dim=8, ratio=0.4),
    "every_key": Shape((9, 9), (3, 3), head_dim=32, ratio=0.0),
    "no_dilation": Shape((7, 9), (5, 7), 3, heads=1, head_dim=8, ratio=0.2),
    "output_smaller_than_cells": Shape((6, 7), (11, 9), head_dim=32, ratio=0.1, windows=("paper",)),
    "one_query_at_a_time": Shape((5, 6), (4, 4), head_dim=32, chunk=1),
    "chunk_of_7": Shape((6, 7), (3, 4), batch=2, head_dim=32, chunk=7),
    "chunk_of_everything": Shape((12, 12), (4, 4), chunk=10**9),
}
CASES = [
    pytest.param(backend, name, window, id=f"{backend}-{name}-{window}")
    for backend in CHECKED
    for name, shape in SHAPES.items()
    for window in shape.windows
    if backend != "natten" or window == "natten"
]
HALF = [case for case in CASES if "square" in case.values or "prime_sizes" in case.values]


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["backend"] == "natten" and not installed():
        pytest.skip("natten is not installed")


def inputs(name: str, window: str) -> tuple[list[torch.Tensor], tuple[AxisWindow, AxisWindow], dict]:
    shape, generator = SHAPES[name], torch.Generator().manual_seed(0)
    dim = shape.heads * shape.head_dim
    tensors = [
        torch.randn(shape.batch, *size, depth, generator=generator)
        for size, depth in ((shape.output, dim), (shape.cells, dim), (shape.cells, shape.channels))
    ]
    rows, cols = (axis_window(n, m, shape.ratio, window) for n, m in zip(shape.output, shape.cells))
    return tensors, (rows, cols), dict(num_heads=shape.heads, q_chunk_size=shape.chunk)


class TestContract:
    """Every backend computes what `dense` computes."""

    @pytest.mark.parametrize(("backend", "name", "window"), CASES)
    def test_values_and_gradients(self, backend: str, name: str, window: str) -> None:
        tensors, windows, options = inputs(name, window)
        results = []
        for each in (backend, "dense"):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            output = window_attention(*leaves, *windows, backend=each, **options)
            cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
            results.append((output.detach(), *torch.autograd.grad(output, leaves, cotangent)))
        (ours, *gradients), (theirs, *expected) = results
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[torch.float32])
        for gradient, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=0, atol=GRADIENT_TOLERANCE * exact.abs().max().item())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(("backend", "name", "window"), HALF)
    def test_half_precision(self, backend: str, name: str, window: str, dtype: torch.dtype) -> None:
        tensors, windows, options = inputs(name, window)
        expected = window_attention(*tensors, *windows, backend="dense", **options)
        output = window_attention(*(tensor.to(dtype) for tensor in tensors), *windows, backend=backend, **options)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=TOLERANCE[dtype])

    @pytest.mark.parametrize("backend", CHECKED)
    def test_values_of_another_type(self, backend: str) -> None:
        (query, key, values), windows, options = inputs("square", "natten")
        expected = window_attention(query, key, values, *windows, backend="dense", **options)
        output = window_attention(query, key, values.bfloat16(), *windows, backend=backend, **options)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=TOLERANCE[torch.bfloat16])


if not INTERPRETED:

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
    @pytest.mark.parametrize("backend", ["triton"])
    def test_interpreted_triton(backend: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 2 * len(SHAPES)
