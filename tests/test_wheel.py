"""The wheel beside a user's own files: every name that a user may have taken is taken, and the checkout is hidden."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from anyup_core.checkpoints import names
from tests.hidden import hide

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("anyup_core", "anyup_jax", "anyup_torch")
TAKEN = ("convert", "train", "evaluate", "settings", "files", "config", "layers", "model")

RUN = """
import os, runpy, sys
checkout, user, wheel = sys.argv[1:4]
editable = [x for x in sys.meta_path if "__editable__" in getattr(x, "__module__", "")]
sys.meta_path[:] = [x for x in sys.meta_path if x not in editable]
sys.path[:] = [user, wheel, *(x for x in sys.path if os.path.realpath(x or ".") != checkout)]
sys.argv[:] = [sys.argv[4], *sys.argv[5:]]
if sys.argv[0] == "anyup":
    from anyup_jax.cli import main
    sys.exit(main())
exec(sys.argv[1])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for item in ("pyproject.toml", "README.md", "LICENSE", *PACKAGES):
        copy = shutil.copytree if (ROOT / item).is_dir() else shutil.copy
        copy(ROOT / item, folder / item)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", "wheels", "."]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    return next((folder / "wheels").glob("*.whl"))


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel in `site`, and in `mine` files whose names the wheel must leave alone."""
    folder = tmp_path_factory.mktemp("user")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    (folder / "mine").mkdir()
    for name in TAKEN:
        (folder / "mine" / f"{name}.py").write_text(f"raise RuntimeError('the {name}.py of the user was imported')\n")
    random = np.random.default_rng(0)
    np.save(folder / "mine" / "features.npy", random.standard_normal((4, 5, 8), np.float32))
    from PIL import Image

    Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "mine" / "image.png")
    return folder


def run(user: Path, *words: str, status: int = 0) -> str:
    command = [sys.executable, "-c", RUN, str(ROOT), str(user / "mine"), str(user / "site"), *words]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ANYUP_RELEASES": "http://127.0.0.1:9"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        command, cwd=user / "mine", env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == status, result.stderr
    return result.stdout if status == 0 else result.stderr


def test_the_wheel_holds_three_packages_their_weights_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        scripts = archive.read(next(name for name in files if name.endswith("entry_points.txt"))).decode()
    assert {name.partition("/")[0] for name in files if ".dist-info/" not in name} == set(PACKAGES)
    assert scripts.split() == ["[console_scripts]", "anyup", "=", "anyup_jax.cli:main"]
    for path in names.SHIPPED.values():
        assert {f"anyup_core/weights/{path.name}", f"anyup_core/weights/{path.stem}.md"} <= set(files)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(files)


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_of_the_user_raises_where_it_is_imported(user: Path, name: str) -> None:
    assert f"the {name}.py of the user" in run(user, "python", f"import {name}", status=1)


JAX = f"""
{hide("torch")}
import numpy as np, anyup_jax
model = anyup_jax.from_pretrained("anyup_efficientnet_lite")
print(anyup_jax.__file__, anyup_jax.upsample(model, np.ones((1, 16, 16, 3), "f"), np.ones((1, 2, 2, 4), "f")).shape)
"""
TORCH = f"""
{hide("jax", "flax")}
import torch, anyup_torch
model = anyup_torch.from_pretrained("anyup_efficientnet_lite")
print(anyup_torch.__file__, tuple(model(torch.ones(1, 3, 16, 16), torch.ones(1, 4, 2, 2)).shape))
"""
each_framework = pytest.mark.parametrize(
    ("program", "shape"), [(JAX, "(1, 16, 16, 4)"), (TORCH, "(1, 4, 16, 16)")], ids=["jax", "torch"]
)


@each_framework
def test_packaged_weights_load_without_the_other_framework(user: Path, program: str, shape: str) -> None:
    said = run(user, "python", program)
    assert said.startswith(str(user / "site"))
    assert said.strip().endswith(shape)


def test_the_command_upsamples(user: Path) -> None:
    words = ("--features", "features.npy", "--out", "F.npy")
    run(user, "anyup", "upsample", "image.png", *words)
    assert np.load(user / "mine" / "F.npy").shape == (40, 50, 8)


def test_the_command_converts_and_lists(user: Path) -> None:
    for source, destination in (("anyup_efficientnet_lite", "x.pth"), ("x.pth", "orbax"), ("orbax", "x.safetensors")):
        assert f"{destination}: 73 tensors" in run(user, "anyup", "convert", source, destination)
        assert "query_encoder.conv.kernel" in run(user, "anyup", "inspect", destination)
    assert "checkout" in run(user, "anyup", "convert", "x.pth", "--verify", status=2)


@each_framework
def test_both_frameworks_load_files_of_a_user(user: Path, program: str, shape: str) -> None:
    path = user / "mine" / "own.safetensors"
    run(user, "anyup", "convert", "anyup_efficientnet_lite", str(path), "--overwrite")
    said = run(user, "python", program.replace("anyup_efficientnet_lite", str(path)))
    assert said.strip().endswith(shape)
