"""The package NATTEN itself against `dense` and the published outputs, through its CPU backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import anyup_torch
from anyup_core.geometry import axis_window
from anyup_torch.attention import natten, window_attention
from parity_tests import tolerances
from parity_tests.golden import CASES, GOLDEN, needs_golden

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}

#        query size, key size, E, batch, heads, K, ratio
SHAPES = {
    "square": ((16, 16), (4, 4), 5, 1, 4, 32, 0.3),
    "chunks_of_values": ((12, 18), (4, 6), 40, 2, 2, 16, 0.3),
    "keys_several_times": ((13, 17), (5, 6), 5, 1, 2, 16, 0.3),
    "odd_head": ((8, 10), (4, 5), 5, 1, 3, 20, 0.2),
    "kernel_larger_than_a_phase": ((5, 9), (2, 2), 3, 1, 2, 8, 0.4),
    "one_row_of_cells": ((6, 20), (1, 5), 3, 1, 2, 8, 0.2),
    "one_cell": ((6, 7), (1, 1), 3, 1, 2, 8, 0.2),
    "every_key": ((9, 9), (3, 3), 5, 1, 2, 32, 0.0),
    "no_dilation": ((7, 9), (5, 7), 3, 1, 1, 8, 0.2),
}


def inputs(name: str, dtype: torch.dtype = torch.float32):
    size, keys, channels, batch, heads, head_dim, ratio = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, *shape, depth, generator=generator).to(dtype)
        for shape, depth in ((size, heads * head_dim), (keys, heads * head_dim), (keys, channels))
    ]
    return tensors, [axis_window(q, k, ratio, "natten") for q, k in zip(size, keys)], heads


@pytest.mark.parametrize("chunk", [None, 1, 7, 10**9])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_dense(name: str, chunk: int | None) -> None:
    tensors, windows, heads = inputs(name)
    expected = window_attention(*tensors, *windows, num_heads=heads, backend="dense")
    output = window_attention(*tensors, *windows, num_heads=heads, backend="natten", q_chunk_size=chunk)
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    tensors, windows, heads = inputs("square", dtype)
    expected = window_attention(*(x.float() for x in tensors), *windows, num_heads=heads, backend="dense")
    output = window_attention(*tensors, *windows, num_heads=heads, backend="natten")
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_values_of_another_type() -> None:
    (query, key, values), windows, heads = inputs("square")
    expected = window_attention(query, key, values, *windows, num_heads=heads, backend="dense")
    half = values.bfloat16()
    output = window_attention(query, key, half, *windows, num_heads=heads, backend="natten")
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=TOLERANCE[torch.bfloat16])


def test_gradients() -> None:
    tensors, windows, heads = inputs("keys_several_times")
    found = []
    for backend in ("natten", "dense"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        window_attention(*leaves, *windows, num_heads=heads, backend=backend).square().sum().backward()
        found.append([x.grad for x in leaves])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_na2d_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """One undilated call for every phase and every chunk of values on a CPU."""
    import natten as package

    calls, real = [], package.na2d
    monkeypatch.setattr(package, "na2d", lambda *a, **k: calls.append((a[0].shape, k["kernel_size"])) or real(*a, **k))
    tensors, windows, heads = inputs("chunks_of_values")
    window_attention(*tensors, *windows, num_heads=heads, backend="natten")
    assert calls == [((2, 4, 6, 2, 16), (3, 5))] * (9 * 3)


def test_one_dilated_call_for_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA would be asked for: all phases at once, values padded to 8 and seen once by every head."""
    import natten as package

    calls, real = [], package.na2d

    def compute(query, key, value, **options):
        calls.append((value.shape, value.stride(3), options["dilation"], options.get("backend")))
        wide = torch.nn.functional.pad(value, (0, query.shape[-1] - value.shape[-1]))
        return real(query, key, wide, backend="flex-fna", **options)[..., : value.shape[-1]]

    monkeypatch.setattr(package, "na2d", compute)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    tensors, windows, heads = inputs("keys_several_times")
    output = natten(*tensors, *windows, num_heads=heads)
    monkeypatch.undo()
    assert calls == [((1, 13, 17, heads, 8), 0, (2, 2), None)]
    expected = window_attention(*tensors, *windows, num_heads=heads, backend="dense")
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE[torch.float32])


@needs_golden
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("variant") == "natten"])
def test_published_outputs(name: str) -> None:
    from safetensors.torch import load_file

    case, arrays = CASES[name], load_file(GOLDEN / f"{name}.safetensors")
    fields = {field: case[field] for field in ("num_heads", "window_ratio")}
    model = anyup_torch.from_pretrained(GOLDEN / case["weights"], window="natten", backend="natten", **fields)
    with torch.no_grad():
        output = model(arrays["image"], arrays["features"], case["output_size"] and tuple(case["output_size"]))
    assert (output - arrays["output"]).abs().max() <= tolerances.OUTPUT


def test_other_windows_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r'backend="natten" computes window="natten" only, got window=\'paper\''):
        anyup_torch.AnyUp(anyup_torch.AnyUpConfig(backend="natten"))
    paper = axis_window(8, 4, 0.3)
    tensors = [torch.zeros(1, n, n, 8) for n in (8, 4, 4)]
    with pytest.raises(ValueError, match=r'computes window="natten" over a whole output only'):
        natten(*tensors, paper, paper, num_heads=1)
    model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(qk_dim=16, backend="natten", window="natten"))
    with pytest.raises(ValueError, match="computes whole outputs only"):
        anyup_torch.upsample_bands(model, torch.zeros(1, 3, 8, 8), torch.zeros(1, 5, 2, 2))


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-build-isolation natten"):
        anyup_torch.AnyUp(anyup_torch.AnyUpConfig(backend="natten", window="natten"))


def test_neighbourhoods_know_their_tables() -> None:
    for queries, keys in ((16, 4), (13, 5), (5, 2), (6, 1)):
        window = axis_window(queries, keys, 0.3, "natten")
        np.testing.assert_array_equal(window.dense(), window.neighbourhood.counts())
        assert axis_window(queries, keys, 0.3).neighbourhood is None
