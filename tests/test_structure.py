"""The layout's promises: import directions, the mirrored files, no path of anybody's machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"anyup_jax": {"torch", "timm", "anyup_torch"}, "anyup_torch": {"jax", "flax", "orbax", "anyup_jax"}}
MIRRORED = ("config", "geometry", "band_plan", "checks", "visualize")


def imports(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    tree = ast.walk(ast.parse(path.read_text()))
    names |= {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_import_direction(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    assert {path.name: imports(path) & FORBIDDEN[package] for path in files if imports(path) & FORBIDDEN[package]} == {}


@pytest.mark.parametrize(
    ("modules", "blocked"),
    [
        ("anyup_jax.model, anyup_jax.pretrained, anyup_jax.cli, anyup_core.visualize", "torch"),
        ("anyup_torch.model, anyup_torch.pretrained, anyup_torch.encoders", "jax"),
        ("convert, anyup_core.checkpoints.formats, anyup_core.geometry, anyup_core.config", "torch"),
        ("convert, anyup_core.checkpoints.formats, anyup_core.geometry, anyup_core.config", "jax"),
    ],
)
def test_imports_without_the_other_framework(modules: str, blocked: str) -> None:
    program = f"import sys; sys.modules[{blocked!r}] = None; import {modules}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", MIRRORED)
def test_framework_free_files_are_the_same(name: str) -> None:
    jax_side, torch_side = ((ROOT / package / f"{name}.py").read_text() for package in ("anyup_jax", "anyup_torch"))
    assert torch_side.replace("anyup_torch", "anyup_jax") == jax_side


def test_mirrored_classes_stand_in_the_same_order() -> None:
    for name in ("layers", "model"):
        jax_side, torch_side = (
            re.findall(r"^class (\w+)", (ROOT / package / f"{name}.py").read_text(), re.MULTILINE)
            for package in ("anyup_jax", "anyup_torch")
        )
        shared = set(jax_side) & set(torch_side)
        assert len(shared) >= 3
        assert [c for c in jax_side if c in shared] == [c for c in torch_side if c in shared]


def test_no_machine_path() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(rb"/(work|root|home)/[a-z]")
    tracked = [name for name in listed.stdout.split("\0") if name]
    assert len(tracked) > 40
    assert [name for name in tracked if pattern.search((ROOT / name).read_bytes())] == []


def test_changelog_knows_the_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(("package", "module"), [("anyup_jax", "visualize"), ("anyup_torch", "encoders")])
def test_modules_are_attributes(package: str, module: str) -> None:
    program = f"import {package}; print({package}.{module}.__name__); {package}.nothing"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.strip() == f"{package}.{module}"
    assert f"module '{package}' has no attribute 'nothing'; it offers AnyUp" in run.stderr
