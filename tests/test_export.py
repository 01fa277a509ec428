"""Programs that `jax.export` makes of the model: for several platforms in one, for any batch and number of channels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import export
from jax.experimental import topologies

import anyup_jax
from anyup_jax import upsamplers
from tests.test_upsamplers import small
from tests.training import ROOT

PLATFORMS = ["cpu", "tpu", "cuda"]
Program = export.Exported


@pytest.fixture(scope="module")
def model() -> anyup_jax.AnyUp:
    return anyup_jax.from_pretrained(next((ROOT / "anyup_core" / "weights").glob("*.safetensors")))


def exported(model: anyup_jax.AnyUp, batch, channels, vjp_order: int = 0) -> Program:
    """Export the call of a model, and read back what would be written."""
    shapes = [jax.ShapeDtypeStruct((batch, *rest), np.float32) for rest in ((48, 64, 3), (6, 8, channels))]
    program = export.export(jax.jit(lambda *inputs: model(*inputs)), platforms=PLATFORMS)(*shapes)
    return export.deserialize(program.serialize(vjp_order))


@pytest.fixture(scope="module")
def of_any_size(model: anyup_jax.AnyUp) -> Program:
    return exported(model, *export.symbolic_shape("batch, channels"))


def inputs(batch: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    image = random.standard_normal((batch, 48, 64, 3), np.float32)
    return image, random.standard_normal((batch, 6, 8, channels), np.float32)


@pytest.mark.parametrize(("batch", "channels"), [(1, 9), (3, 9), (1, 384), (3, 513)])
def test_one_program_for_any_batch_and_channels(
    batch: int, channels: int, model: anyup_jax.AnyUp, of_any_size: Program
) -> None:
    image, features = inputs(batch, channels)
    expected = anyup_jax.upsample(model, image, features)
    np.testing.assert_allclose(of_any_size.call(image, features), expected, rtol=0, atol=2e-5)


def test_the_kernels_are_in_it(of_any_size: Program) -> None:
    assert of_any_size.platforms == ("cpu", "tpu", "cuda")
    assert "tpu_custom_call" in of_any_size.mlir_module()


@pytest.mark.slow
@pytest.mark.parametrize("channels", [384, 900])
def test_it_compiles_for_a_tpu(channels: int, of_any_size: Program) -> None:
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in inputs(2, channels)]
    compiled = jax.jit(lambda *inputs: of_any_size.call(*inputs)).lower(*shapes).compile()
    assert "tpu_custom_call" in compiled.as_text()


def test_a_program_with_its_gradient(model: anyup_jax.AnyUp) -> None:
    program, (image, features) = exported(model, 2, 5, vjp_order=1), inputs(2, 5)

    def gradients(call):
        return jax.grad(lambda *inputs: (call(*inputs) ** 2).sum(), (0, 1))(image, features)

    for ours, theirs in zip(gradients(program.call), gradients(model)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * abs(theirs).max())


SIZES: dict[str, Any] = dict(image_size=(48, 64), features=(6, 8))
ALONE = """
import sys
for name in ("anyup_core", "anyup_jax", "anyup_torch", "torch", "flax"):
    sys.modules[name] = None
import numpy as np
from jax import export
with open(sys.argv[1], "rb") as file:
    program = export.deserialize(bytearray(file.read()))
given = np.load(sys.argv[2])
np.save(sys.argv[3], program.call(given["image"], given["features"]))
"""


@pytest.fixture(scope="module")
def file(model: anyup_jax.AnyUp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.stablehlo"
    assert anyup_jax.export(model, path, **SIZES) == path
    return path


@pytest.mark.parametrize(("batch", "channels"), [(1, 9), (3, 384)])
def test_a_written_program(batch: int, channels: int, model: anyup_jax.AnyUp, file: Path) -> None:
    given = inputs(batch, channels)
    expected = anyup_jax.upsample(model, *given)
    np.testing.assert_allclose(anyup_jax.load_exported(file)(*given), expected, rtol=0, atol=2e-5)


def test_what_is_in_a_written_program(file: Path) -> None:
    program = export.deserialize(bytearray(file.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "tpu_custom_call" in program.mlir_module()
    assert str(ROOT).encode() not in file.read_bytes()


def test_it_needs_jax_alone(model: anyup_jax.AnyUp, file: Path, tmp_path: Path) -> None:
    (image, features), output = inputs(3, 9), tmp_path / "output.npy"
    np.savez(tmp_path / "given.npz", image=image, features=features)
    subprocess.run([sys.executable, "-c", ALONE, file, tmp_path / "given.npz", output], cwd=tmp_path, check=True)
    expected = anyup_jax.upsample(model, image, features)
    np.testing.assert_allclose(np.load(output), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", upsamplers.NAMES)
def test_every_upsampler(method: str, tmp_path: Path) -> None:
    model, path = small(method), tmp_path / "model.stablehlo"
    anyup_jax.export(model, path, image_size=(24, 32), features=(3, 4), output_size=(40, 36))
    program, random = anyup_jax.load_exported(path), np.random.default_rng(0)
    for batch, channels in ((1, 8), (3, 24)):
        image = random.standard_normal((batch, 24, 32, 3), np.float32)
        features = random.standard_normal((batch, 3, 4, model.channels or channels), np.float32)
        expected = np.asarray(model(image, features, (40, 36)))
        tolerance = 2e-5 * max(1.0, float(abs(expected).max()))
        np.testing.assert_allclose(program(image, features), expected, rtol=0, atol=tolerance)


def test_a_program_in_bfloat16_for_one_platform(tmp_path: Path) -> None:
    model, path = small("anyup"), tmp_path / "model.stablehlo"
    anyup_jax.export(model, path, **SIZES, batch=2, dtype="bfloat16", platforms=("cpu",))
    program = export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == ("cpu",)
    assert "bf16" in program.mlir_module()
    assert model.dtype == np.float32
    output, expected = program.call(*inputs(2, 9)), model(*inputs(2, 9))
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, expected, rtol=0, atol=0.3)


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("model.pt2", {}, ValueError),
        ("absent/model.stablehlo", {}, FileNotFoundError),
        ("model.stablehlo", dict(image_size=None), TypeError),
        ("model.stablehlo", dict(features=None), TypeError),
        ("model.stablehlo", dict(features=(6, 0)), ValueError),
        ("model.stablehlo", dict(output_size=0), ValueError),
        ("model.stablehlo", dict(batch=0), ValueError),
        ("model.stablehlo", dict(dtype="float16"), ValueError),
        ("model.stablehlo", dict(platforms=("npu",)), ValueError),
        ("model.stablehlo", dict(platforms=()), ValueError),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind) as refused:
        anyup_jax.export(small("anyup"), tmp_path / name, **SIZES | changes)
    assert str(refused.value).count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_refuses_what_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "model.stablehlo"
    path.write_bytes(b"no program")
    with pytest.raises(ValueError, match="jax"):
        anyup_jax.load_exported(path)


def test_flatbuffers_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        anyup_jax.export(small("anyup"), tmp_path / "model.stablehlo", **SIZES)
