"""The Triton backend, compiled for GPUs that are not there; `test_attention.py` runs it in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from anyup_torch.attention.triton import available, triton
from benchmarks.gpu import SIZES, TARGETS, compile_size
from tests.test_attention import torch_inputs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_compiles_for_gpus(size, dtype, target):
    for resources in compile_size(size, dtype, target):
        assert resources.shared <= TARGETS[target], resources
        assert resources.spills == 0, resources


def test_refuses_cpu_tensors():
    tensors, windows, options = torch_inputs("square", "paper")
    with pytest.raises(ValueError, match=r'runs on CUDA devices, the queries are on cpu.*backend="tiled"'):
        triton(*tensors, *windows, **options)
    assert not available(torch.device("cpu"))


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tensors, windows, options = torch_inputs("square", "paper")
    with pytest.raises(ImportError, match="pip install triton"):
        triton(*tensors, *windows, **options)


OFFSETS = """
import torch, triton
import triton.language as tl
from anyup_torch.attention.triton_kernels import _block, _tile

@triton.jit
def places(out, first_row, first_col, start_row, start_col, row_bias, col_bias, width, key_width, N: tl.constexpr):
    tile_row, tile_col, in_row, in_col, positions, inside, own = _tile(first_row, first_col, 1, 1, N, width, N)
    keys, exists, bias = _block(0, tile_row, tile_col, in_row, in_col, start_row, start_col, row_bias, col_bias,
                                1, N, 1, N, key_width, N)
    tl.store(out + tl.arange(0, N), positions)
    tl.store(out + N + tl.arange(0, N), keys)

def table(*values):
    return torch.tensor(values, dtype=torch.int32)

out, bias = torch.zeros(8, dtype=torch.int64), torch.zeros(16)
row, column = table(1 << 14, (1 << 14) + 1), table(0, 4)
places[(1,)](out, row, column, row, column, bias, bias, 1 << 18, 1 << 19, 4)
print(*out.tolist())
"""


def test_offsets_are_wider_than_int32():
    """Row 2**14 of 2**18 columns begins at element 2**32, and of 2**19 columns at 2**33."""
    run = subprocess.run(
        [sys.executable, "-c", OFFSETS], capture_output=True, text=True, check=True,
        env=os.environ | dict(TRITON_INTERPRET="1"), cwd=Path(__file__).parents[1],
    )  # fmt: skip
    places = list(map(int, run.stdout.split()))
    assert places == [2**32 + column for column in range(4)] + [2**33 + column for column in range(4)]
