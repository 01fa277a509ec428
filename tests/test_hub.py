"""torch.hub, from a local checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
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


ALLOWED = {"torch", "torchgen", "functorch", "numpy", "jaxtyping", "wadler_lindig", "ml_dtypes", "safetensors"} | {
    "filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "setuptools",
    "triton", "packaging",
}  # fmt: skip
"""The dependencies of hubconf.py, and what these need."""

FROM_ARCHIVE = """
import importlib.machinery, shutil, sys
import torch

class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        if spec and "site-packages" in str(spec.origin) and name.partition(".")[0].lower() not in ALLOWED:
            return None
        return spec

others = [f for f in sys.meta_path if "editable" not in str(f) and f is not importlib.machinery.PathFinder]
sys.meta_path[:] = [*others, Installed]
torch.hub.download_url_to_file = lambda url, path, **_: shutil.copy(ARCHIVE, path)  # what GitHub would serve
options = dict(trust_repo=True, skip_validation=True, verbose=False)
for name, pretrained in (("anyup_efficientnet_lite", True), ("anyup", PRETRAINED), ("anyup_multi_backbone", False)):
    model = torch.hub.load("owner/repository:main", name, pretrained=pretrained, **options)
    with torch.no_grad():
        output = model(torch.zeros(1, 3, 28, 28), torch.ones(1, 5, 2, 2), output_size=16, q_chunk_size=64)
    print(name, tuple(output.shape), sys.modules[type(model).__module__].__file__)
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"jax", "flax", "rich", "einops", "platformdirs"}))
"""


def test_from_an_archive_with_nothing_but_the_dependencies(tmp_path: Path) -> None:
    """As GitHub serves it; the weights of the paper lie in torch.hub's own cache."""
    files = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split("\n")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.mkdir("repository-main")
        for file in files:
            if file.startswith(("anyup_", "hubconf.py")):
                archive.write(Path(REPO, file), f"repository-main/{file}")
    there = (GOLDEN / "weights.pth").is_file()
    if there:
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        shutil.copy(GOLDEN / "weights.pth", tmp_path / "hub" / "checkpoints" / "anyup_paper.pth")
    program = f"ALLOWED, ARCHIVE, PRETRAINED = {ALLOWED!r}, {str(tmp_path / 'archive.zip')!r}, {there}\n{FROM_ARCHIVE}"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ANYUP_CACHE")}
    environment |= dict(TORCH_HOME=str(tmp_path), ANYUP_RELEASES="http://127.0.0.1:9/nothing")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    *lines, unwanted = [line for line in run.stdout.split("\n")[:-1] if not line.startswith("Downloading:")]
    assert [line.split(" ", 1)[0] for line in lines] == ["anyup_efficientnet_lite", "anyup", "anyup_multi_backbone"]
    assert all("(1, 5, 16, 16)" in line and str(tmp_path / "hub") in line for line in lines), lines
    assert unwanted == ""


def test_dependencies_are_the_least() -> None:
    spec = importlib.util.spec_from_file_location("hubconf_read", Path(REPO, "hubconf.py"))
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    assert hubconf.dependencies == ["torch", "numpy", "jaxtyping", "ml_dtypes", "safetensors"]
