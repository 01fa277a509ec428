"""The Triton backend: interpreted on the CPU against `dense`, and compiled for GPUs that are not there.

Triton decides whether it interprets when a kernel is defined, so the interpreted checks run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from anyup_core.geometry import axis_window
from anyup_torch.attention.dense import dense
from anyup_torch.attention.triton import available, triton
from benchmarks.gpu import SIZES, TARGETS, compile_size

#        query size, key size, E, batch, heads, K, ratio, window, chunk
SHAPES = {
    "square": ((16, 16), (4, 4), 5, 1, 4, 32, 0.3, "paper", None),
    "natten": ((12, 18), (4, 6), 5, 2, 4, 32, 0.3, "natten", None),
    "natten_odd": ((13, 17), (5, 6), 5, 1, 2, 16, 0.3, "natten", None),
    "odd": ((11, 7), (5, 3), 1, 1, 1, 64, 0.25, "paper", None),
    "wide": ((9, 10), (4, 4), 385, 1, 4, 32, 0.25, "paper", None),
    "everything": ((6, 7), (11, 9), 5, 1, 2, 32, 0.0, "paper", None),
    "odd_head": ((6, 7), (4, 5), 5, 1, 3, 20, 0.3, "paper", None),
    "chunk": ((9, 9), (4, 4), 5, 2, 2, 32, 0.3, "paper", 7),
    "one_query": ((3, 4), (4, 4), 5, 1, 2, 32, 0.3, "paper", 1),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(name: str, dtype: torch.dtype):
    size, keys, channels, batch, heads, head_dim, ratio, window, chunk = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, *shape, depth, generator=generator).to(dtype)
        for shape, depth in ((size, heads * head_dim), (keys, heads * head_dim), (keys, channels))
    ]
    windows = [axis_window(q, k, ratio, window) for q, k in zip(size, keys, strict=True)]
    return tensors, windows, heads, chunk


def check_interpreted() -> None:
    """Compare with `dense` in float32; run in a process whose Triton interprets."""
    for name in SHAPES:
        for dtype in TOLERANCE if name in ("square", "natten") else (torch.float32,):
            tensors, windows, heads, chunk = inputs(name, dtype)
            expected = dense(*(x.float() for x in tensors), *windows, num_heads=heads)
            result = triton(*tensors, *windows, num_heads=heads, q_chunk_size=chunk)
            assert result.dtype == dtype, name
            error = (result.float() - expected).abs().max().item()
            print(name, dtype, f"{error:.1e}")
            assert error <= TOLERANCE[dtype], (name, dtype, error)
    tensors, windows, heads, chunk = inputs("natten", torch.float32)
    grads = []
    for backend in (triton, dense):
        leaves = [x.clone().requires_grad_() for x in tensors]
        backend(*leaves, *windows, num_heads=heads).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    print("gradients agree")


def test_interpreted_equals_dense():
    code = "from tests.test_triton import check_interpreted; check_interpreted()"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gradients agree" in done.stdout


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_compiles_for_gpus(size, dtype, target):
    for resources in compile_size(size, dtype, target):
        assert resources.shared <= TARGETS[target], resources
        assert resources.spills == 0, resources


def test_refuses_cpu_tensors():
    tensors, windows, heads, _ = inputs("square", torch.float32)
    with pytest.raises(ValueError, match=r'runs on CUDA devices, the queries are on cpu.*backend="tiled"'):
        triton(*tensors, *windows, num_heads=heads)
    assert not available(torch.device("cpu"))


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tensors, windows, heads, _ = inputs("square", torch.float32)
    with pytest.raises(ImportError, match="pip install triton"):
        triton(*tensors, *windows, num_heads=heads)
