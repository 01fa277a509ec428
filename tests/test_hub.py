"""torch.hub, from a local checkout."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parity_tests.golden import GOLDEN, needs_golden

REPO = str(Path(__file__).resolve().parents[1])


@pytest.mark.parametrize("name", ["anyup", "anyup_multi_backbone"])
@pytest.mark.parametrize(("use_natten", "window"), [(False, "paper"), (True, "natten")])
def test_random_model(name: str, use_natten: bool, window: str) -> None:
    model = torch.hub.load(REPO, name, source="local", use_natten=use_natten, pretrained=False, device="cpu")
    assert model.config.window == window
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 28, 28), torch.ones(1, 5, 2, 2)).shape == (1, 5, 28, 28)


@pytest.mark.parametrize("there", [False, True])
def test_a_line_says_that_natten_is_missing(
    there: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: (there or None) if name == "natten" else found(name))
    torch.hub.load(REPO, "anyup", source="local", use_natten=True, pretrained=False)
    lines = [record.getMessage() for record in caplog.records if record.name == "anyup_torch"]
    expected = 'NATTEN is not installed; its windows are computed by backend="tiled", with the same result.'
    assert lines == ([] if there else [expected])


def test_device_is_obeyed() -> None:
    model = torch.hub.load(REPO, "anyup", source="local", pretrained=False, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@needs_golden
@pytest.mark.parametrize(
    ("name", "file"), [("anyup", "anyup_paper.pth"), ("anyup_multi_backbone", "anyup_multi_backbone.pth")]
)
def test_pretrained_model_comes_from_the_cache(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYUP_CACHE", str(tmp_path))
    shutil.copy(GOLDEN / "weights.pth", tmp_path / file)
    model = torch.hub.load(REPO, name, source="local", use_natten=True)
    assert model.config.window == "natten"
    weights = torch.load(GOLDEN / "weights.pth", weights_only=True)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


def test_needs_nothing_but_its_dependencies() -> None:
    """What hubconf and a model import, besides the standard library, PyTorch's own needs and this repository."""
    program = """
import sys, torch, numpy
before = set(sys.modules)
import hubconf
hubconf.anyup(pretrained=False)
names = {name.partition(".")[0] for name in set(sys.modules) - before}
outside = {n for n in names if "site-packages" in str(getattr(sys.modules.get(n), "__file__", ""))}
print(*(outside - {"sympy", "mpmath", "triton"} - set(hubconf.dependencies)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO, check=True)
    assert run.stdout.split() == []
