"""How the package NATTEN is called, and its outputs against the published ones; `test_attention.py` has more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import anyup_torch
from anyup_core.geometry import axis_window
from anyup_torch.attention import natten, window_attention
from anyup_torch.attention.natten import installed
from parity_tests import tolerances
from parity_tests.golden import CASES, GOLDEN, needs_golden
from tests.test_attention import torch_inputs

TOLERANCE = 2e-6
needs_natten = pytest.mark.skipif(not installed(), reason="natten is not installed")


@needs_natten
def test_na2d_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """One undilated call for every phase and every chunk of values on a CPU."""
    import natten as package

    calls, real = [], package.na2d
    monkeypatch.setattr(package, "na2d", lambda *a, **k: calls.append((a[0].shape, k["kernel_size"])) or real(*a, **k))
    tensors, windows, options = torch_inputs("c40", "natten")
    window_attention(*tensors, *windows, backend="natten", **options)
    assert calls == [((2, 4, 6, 2, 16), (3, 5))] * (9 * 3)


@needs_natten
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
    tensors, windows, options = torch_inputs("prime_sizes", "natten")
    output = natten(*tensors, *windows, **options)
    monkeypatch.undo()
    assert calls == [((1, 23, 17, 2, 8), 0, (4, 5), None)]
    expected = window_attention(*tensors, *windows, backend="dense", **options)
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)


@needs_natten
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


@needs_natten
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
