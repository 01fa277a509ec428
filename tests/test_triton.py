"""The Triton backend, compiled for GPUs that are not there; `test_attention.py` runs it in the interpreter."""

from __future__ import annotations

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
