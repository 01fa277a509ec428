"""Programs that `torch.export` makes of the upsamplers, for any batch and number of channels, and libraries of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anyup_torch
from anyup_torch import upsamplers
from tests.test_torch_upsamplers import infer, small
from tests.training import ROOT

SIZES: dict[str, Any] = dict(image_size=(48, 64), features=(6, 8))
ALONE = """
import sys
for name in ("anyup_core", "anyup_torch", "anyup_jax", "jax"):
    sys.modules[name] = None
import torch
program = torch.export.load(sys.argv[1]).module()
image, features = torch.load(sys.argv[2])
with torch.inference_mode():
    torch.save(program(image, features), sys.argv[2])
"""


@pytest.fixture(scope="module")
def model() -> anyup_torch.AnyUp:
    return anyup_torch.from_pretrained(next((ROOT / "anyup_core" / "weights").glob("*.safetensors")))


@pytest.fixture(scope="module")
def file(model: anyup_torch.AnyUp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    assert anyup_torch.export(model, path, **SIZES) == path
    return path


def inputs(batch: int, channels: int, image=(48, 64), cells=(6, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch + channels)
    shapes = (batch, 3, *image), (batch, channels, *cells)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def program(path: Path) -> torch.nn.Module:
    return torch.export.load(path).module()


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (1, 9), (3, 9), (1, 384), (3, 384)])
def test_one_program_for_any_batch_and_channels(
    batch: int, channels: int, model: anyup_torch.AnyUp, file: Path
) -> None:
    given = inputs(batch, channels)
    close(infer(program(file), *given), infer(model, *given))


def test_it_needs_torch_alone(model: anyup_torch.AnyUp, file: Path, tmp_path: Path) -> None:
    given, exchanged = inputs(3, 9), tmp_path / "tensors.pt"
    torch.save(given, exchanged)
    subprocess.run([sys.executable, "-c", ALONE, file, exchanged], cwd=tmp_path, check=True)
    close(torch.load(exchanged), infer(model, *given))


def test_it_holds_no_images_and_no_lines_of_this_machine(file: Path) -> None:
    loaded = torch.export.load(file)
    assert loaded.example_inputs is None
    assert str(ROOT).encode() not in file.read_bytes()
    weights = sum(tensor.numel() for tensor in loaded.state_dict.values())
    assert file.stat().st_size < 4 * weights + (1 << 20)


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = anyup_torch.AnyUp(qk_dim=16, num_heads=2)
    anyup_torch.export(model, tmp_path / "model.pt2", **SIZES, dtype="bfloat16")
    assert model.training
    assert model.dtype == torch.float32
    assert all(tensor.requires_grad for name, tensor in model.named_parameters() if "out_proj" not in name)


# other sizes of the output, windows that wrap over cells, tiles that do not divide it, features of odd sizes
CASES = {
    "larger": (dict(), dict(image_size=(40, 56), features=(5, 7), output_size=(61, 50))),
    "smaller": (dict(), dict(image_size=32, features=(6, 6, 9), output_size=5)),
    "global": (dict(window_ratio=0.0), dict(image_size=(24, 32), features=(3, 4))),
    "natten": (dict(window="natten"), dict(image_size=(24, 32), features=(5, 6))),
    "kernel": (dict(kernel_size=3), dict(image_size=(24, 32), features=(3, 4))),
    "fixed batch": (dict(), dict(image_size=(24, 32), features=(3, 4), batch=3)),
}


@pytest.mark.parametrize("case", CASES)
def test_sizes_and_windows(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["anyup_torch.attention.exported"], "PAIRS", 1 << 10)  # several groups of tiles
    fields, sizes = CASES[case]
    torch.manual_seed(0)
    model = anyup_torch.AnyUp(qk_dim=16, num_heads=2, **fields)
    sides, cells = np.broadcast_to(sizes["image_size"], 2).tolist(), sizes["features"][:2]
    path = anyup_torch.export(model, tmp_path / "model.pt2", **sizes)
    given = inputs(3, 7, sides, cells)
    close(infer(program(path), *given), infer(model, *given, sizes.get("output_size")))


@pytest.mark.parametrize("method", upsamplers.NAMES)
def test_every_upsampler(method: str, tmp_path: Path) -> None:
    model = small(method)
    path = anyup_torch.export(model, tmp_path / "model.pt2", image_size=(24, 32), features=(3, 4), output_size=(40, 36))
    loaded = program(path)
    for batch, channels in ((1, 8), (3, 24)):
        given = inputs(batch, model.channels or channels, (24, 32), (3, 4))
        output = infer(loaded, *given)
        close(output, infer(model, *given, (40, 36)), 2e-5 * max(1.0, float(output.abs().max())))


def test_precision(file: Path, tmp_path: Path, model: anyup_torch.AnyUp) -> None:
    """Image, features and output stay float32."""
    path = anyup_torch.export(model, tmp_path / "half.pt2", **SIZES, dtype="float16")
    assert path.stat().st_size < 0.7 * file.stat().st_size
    given = inputs(2, 5)
    output = infer(program(path), *given)
    assert output.dtype == torch.float32
    close(output, infer(model, *given), 0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_library(model: anyup_torch.AnyUp, tmp_path: Path) -> None:
    path = anyup_torch.export(model, tmp_path / "model.aoti.pt2", **SIZES)
    library = torch._inductor.aoti_load_package(str(path))
    for batch, channels in ((1, 9), (3, 9), (1, 384)):
        given = inputs(batch, channels)
        close(infer(library, *given), infer(model, *given), 5e-4)  # what Inductor fuses is rounded otherwise


def test_library_needs_a_compiler(model: anyup_torch.AnyUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(RuntimeError, match="C\\+\\+"):
        anyup_torch.export(model, tmp_path / "model.aoti.pt2", **SIZES)


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("model.onnx", {}, ValueError),
        ("absent/model.pt2", {}, FileNotFoundError),
        ("model.pt2", dict(image_size=None), TypeError),
        ("model.pt2", dict(image_size=(0, 8)), ValueError),
        ("model.pt2", dict(features=None), TypeError),
        ("model.pt2", dict(features=(6,)), TypeError),
        ("model.pt2", dict(features=(6, 0, 3)), ValueError),
        ("model.pt2", dict(output_size=(4, 4, 4)), TypeError),
        ("model.pt2", dict(batch=0), ValueError),
        ("model.pt2", dict(dtype="int8"), ValueError),
        ("model.pt2", dict(dtype=torch.float64), ValueError),
        ("model.pt2", dict(features=(60, 80)), ValueError),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], kind: type[Exception], tmp_path: Path) -> None:
    model = anyup_torch.AnyUp(qk_dim=16, num_heads=2, window="natten")  # which needs outputs of the features' size
    with pytest.raises(kind) as refused:
        anyup_torch.export(model, tmp_path / name, **SIZES | changes)
    assert str(refused.value).count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_refuses_other_models_and_widths(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        anyup_torch.export(torch.nn.Identity(), tmp_path / "model.pt2", **SIZES)
    for method, channels in (("jafar", 9), ("naf", 9)):
        with pytest.raises(ValueError, match="channels"):
            anyup_torch.export(small(method), tmp_path / "model.pt2", image_size=48, features=(6, 6, channels))
