"""The module `anyup` of compat/anyup, as a project that was written for the published package uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("compat")
    shutil.copytree(ROOT / "compat/anyup", folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, "."]
    subprocess.run(build, cwd=folder / "source", check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("anyup_jax_compat-*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, program: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_holds_one_package_and_needs_the_main_one(site: Path) -> None:
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"anyup"}
    metadata = next(site.glob("*.dist-info/METADATA")).read_text().splitlines()
    assert [line for line in metadata if line.startswith("Requires-Dist")] == ["Requires-Dist: anyup-jax[torch]==0.1.0"]


def test_a_published_state_dict_and_the_published_arguments(site: Path) -> None:
    program = """
import torch
import anyup_torch
from anyup.model import AnyUp

trained = anyup_torch.from_pretrained("anyup_efficientnet_lite")
model = AnyUp(input_dim=3, qk_dim=128, window_ratio=0.1, use_natten=False).eval()
model.load_state_dict(trained.state_dict())
image, features = torch.rand(1, 3, 32, 48), torch.rand(1, 5, 4, 6)
with torch.no_grad():
    same = torch.equal(model(image, features, q_chunk_size=256), trained(image, features, q_chunk_size=256))
print(same, AnyUp(use_natten=True, num_heads=2).config.window, AnyUp(lfu_dim=8).config.filters)
"""
    assert run(site, program) == "True natten 8"


def test_entry_points_of_the_published_hubconf(site: Path) -> None:
    program = """
import anyup

for create in (anyup.anyup, anyup.anyup_multi_backbone):
    model = create(use_natten=True, pretrained=False, device="meta")
    print(type(model) is anyup.AnyUp, model.config.window, model.training, model.rope.freqs.device)
"""
    assert run(site, program).splitlines() == ["True natten False meta"] * 2


def test_unknown_arguments_are_named(site: Path) -> None:
    program = """
from anyup.model import AnyUp

print(AnyUp(13, 32, 3, lfu_dim=16).config)
try:
    AnyUp(dropout=0.1)
except TypeError as error:
    print(error)
"""
    config, refusal = run(site, program).splitlines()
    assert "input_dim=13, qk_dim=32, kernel_size=3, kernel_size_lfu=5, lfu_dim=16" in config
    assert "dropout" in refusal
