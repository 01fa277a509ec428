"""ONNX files: what ONNX Runtime makes of them, for every size, against PyTorch; their inputs; and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as runtime
import pytest
import torch

import anyup_core
import anyup_torch
import anyup_torch.upsamplers.featup
import anyup_torch.upsamplers.jafar
import anyup_torch.upsamplers.naf
from anyup_core.export import graph, inputs, onnx_file
from anyup_core.export.builder import all_nodes
from anyup_core.preprocessing import IMAGENET, normalize
from anyup_jax import cli
from anyup_torch import upsamplers
from tests import hidden

WEIGHTS = "anyup_efficientnet_lite"


@pytest.fixture(scope="module")
def model() -> anyup_torch.AnyUp:
    return anyup_torch.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def path(model: anyup_torch.AnyUp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return anyup_torch.export_onnx(model, tmp_path_factory.mktemp("onnx") / "anyup.onnx")


def run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return runtime.InferenceSession(str(path)).run(None, feeds)[0]


@torch.inference_mode()
def expected(
    model: anyup_torch.AnyUp, image: np.ndarray, features: np.ndarray, *args: Any, **options: Any
) -> np.ndarray:
    return model(torch.from_numpy(image), torch.from_numpy(features), *args, **options).numpy()


def noise(
    batch: int, image: tuple[int, int], cells: tuple[int, int], channels: int, depth: int = 3
) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((batch, *shape), np.float32) for shape in ((depth, *image), (channels, *cells))]


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max() / 4))


SIZES = {
    "plain": (1, (64, 96), (4, 6), 9, None),
    "odd": (3, (61, 45), (7, 5), 32, None),
    "prime output": (2, (64, 64), (8, 8), 12, (97, 53)),
    "smaller output": (1, (64, 64), (8, 8), 384, (32, 40)),
    "one cell": (1, (16, 16), (1, 1), 3, None),
    "one pixel": (1, (1, 1), (1, 1), 3, (5, 7)),
    "narrow": (1, (200, 8), (25, 1), 4, None),
    "more cells than pixels": (1, (8, 8), (12, 10), 5, None),
    "large": (1, (224, 224), (14, 14), 320, None),
}


@pytest.mark.parametrize("case", SIZES)
def test_one_file_for_every_size(case: str, model: anyup_torch.AnyUp, path: Path) -> None:
    batch, image_size, cells, channels, size = SIZES[case]
    image, features = noise(batch, image_size, cells, channels)
    output = run(path, anyup_core.onnx_inputs(path, image, features, size))
    close(output, expected(model, image, features, size))


def test_a_photograph_with_features_of_an_encoder(model: anyup_torch.AnyUp, path: Path) -> None:
    import skimage.data

    from anyup_core.files import resize_image
    from anyup_jax import encoders

    photograph = resize_image(skimage.data.astronaut(), (224, 192))
    features = encoders.create("efficientnet_lite0", layer=-2).encode_array(photograph / np.float32(255))
    features = features * (40 / np.linalg.norm(features, axis=-1).mean())
    image, features = (
        np.ascontiguousarray(x.transpose(2, 0, 1)[None], np.float32) for x in (normalize(photograph), features)
    )
    close(run(path, anyup_core.onnx_inputs(path, image, features)), expected(model, image, features))


def test_values(model: anyup_torch.AnyUp, path: Path) -> None:
    image, features = noise(2, (32, 48), (4, 6), 9)
    values = np.random.default_rng(1).standard_normal((2, 3, 4, 6), np.float32)
    output = run(path, anyup_core.onnx_inputs(path, image, features, 40, values))
    close(output, expected(model, image, features, 40, values=torch.from_numpy(values)))


@pytest.mark.parametrize(
    "settings",
    [
        dict(window="natten"),
        dict(window_ratio=0.0),
        dict(input_dim=5, kernel_size=3, qk_dim=64, num_heads=2, lfu_dim=32, kernel_size_lfu=3, window_ratio=0.3),
    ],
)
def test_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = anyup_torch.AnyUp(**settings).eval()
    path = anyup_torch.export_onnx(model, tmp_path / "model.onnx")
    for size in (None, (37, 41)):
        image, features = noise(2, (32, 40), (4, 5), 6, model.config.input_dim)
        close(run(path, anyup_core.onnx_inputs(path, image, features, size)), expected(model, image, features, size))


def test_the_file_is_small(path: Path) -> None:
    saved = onnx.load(path)
    assert len(list(all_nodes(saved.graph.node))) <= 450
    assert path.stat().st_size <= 4e6
    assert saved.opset_import[0].version == 18


def test_float16_weights(model: anyup_torch.AnyUp, path: Path, tmp_path: Path) -> None:
    half = anyup_torch.export_onnx(model, tmp_path / "half.onnx", dtype="float16")
    assert half.stat().st_size < 0.55 * path.stat().st_size
    assert len(list(all_nodes(onnx.load(half).graph.node))) <= 450
    image, features = noise(1, (64, 64), (4, 4), 32)
    close(run(half, anyup_core.onnx_inputs(half, image, features)), expected(model, image, features), 1e-2)


@pytest.mark.parametrize("output_size", [None, (53, 70)])
def test_a_closed_file(output_size: tuple[int, int] | None, model: anyup_torch.AnyUp, tmp_path: Path) -> None:
    sizes = dict(image_size=(64, 96), features=(4, 6, 9), output_size=output_size)
    path = anyup_torch.export_onnx(model, tmp_path / "closed.onnx", **sizes)
    session = runtime.InferenceSession(str(path))
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [
        ("image", [1, 3, 64, 96]),
        ("features", [1, 9, 4, 6]),
    ]
    image, features = noise(1, (64, 96), (4, 6), 9)
    close(session.run(None, dict(image=image, features=features))[0], expected(model, image, features, output_size))
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not kinds & {"Scan", "Loop", "If"}


def test_openvino_runs_a_closed_file(model: anyup_torch.AnyUp, tmp_path: Path) -> None:
    """In a process of its own without its telemetry, which would be sent from a fork of this one at the import."""
    path = anyup_torch.export_onnx(model, tmp_path / "closed.onnx", image_size=(64, 96), features=(4, 6, 9))
    image, features = noise(1, (64, 96), (4, 6), 9)
    np.savez(tmp_path / "inputs.npz", image=image, features=features)
    program = (
        hidden.hide("openvino_telemetry")
        + f"""
import numpy as np
import openvino

core = openvino.Core()
compiled = core.compile_model(core.read_model({str(path)!r}), "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
np.save("output.npy", compiled(dict(np.load("inputs.npz")))[0])
"""
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    close(np.load(tmp_path / "output.npy"), expected(model, image, features))


def test_an_encoder_and_anyup_in_one_file(model: anyup_torch.AnyUp, tmp_path: Path) -> None:
    path = anyup_torch.export_onnx(model, tmp_path / "both.onnx", encoder="efficientnet_lite0", stride=32)
    encoder = onnx_file.write_encoder("efficientnet_lite0", tmp_path / "encoder.onnx")
    image = noise(2, (70, 96), (1, 1), 1)[0]
    session = runtime.InferenceSession(str(encoder))
    facts = json.loads(session.get_modelmeta().custom_metadata_map["anyup_encoder"])
    (mean, std), (own_mean, own_std) = (
        [np.array(x, np.float32)[:, None, None] for x in pair] for pair in (IMAGENET, (facts["mean"], facts["std"]))
    )
    (features,) = session.run(["stride32"], {"image": (image * std + mean - own_mean) / own_std})
    assert features.shape == (2, 320, 2, 3)
    close(run(path, anyup_core.onnx_inputs(path, image)), expected(model, image, features))
    with pytest.raises(ValueError, match="holds an encoder"):
        anyup_core.onnx_inputs(path, image, features)


def test_the_function_beside_the_file_needs_numpy_alone(path: Path) -> None:
    image, features = noise(1, (30, 20), (4, 3), 5)
    program = (
        hidden.hide("anyup_core", "anyup_torch", "jaxtyping", "onnx", "ml_dtypes")
        + f"""
import sys
import numpy as np

sys.path.insert(0, {str(path.parent)!r})
from anyup_inputs import onnx_inputs

image, features = (np.arange(np.prod(s), dtype=np.float32).reshape(s) for s in ({image.shape}, {features.shape}))
feeds = onnx_inputs({str(path)!r}, image, features, (17, 23))
np.savez({str(path.parent / "feeds.npz")!r}, **feeds)
"""
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=path.parent)
    given = [np.arange(x.size, dtype=np.float32).reshape(x.shape) for x in (image, features)]
    ours, theirs = anyup_core.onnx_inputs(path, *given, (17, 23)), np.load(path.parent / "feeds.npz")
    assert set(ours) == set(theirs.files)
    for name, table in ours.items():
        np.testing.assert_array_equal(table, theirs[name], strict=True)


def test_tables_are_those_of_the_graph(path: Path) -> None:
    naf = dict(periods=[1.0] * 32, rope_heads=1, neighbourhood=3, tables=list(graph.TABLES))
    tables = inputs.onnx_tables(inputs.onnx_settings(path) | naf, (2, 3, 50, 60), (2, 7, 5, 6), (51, 61), 4)
    assert set(tables) == set(graph.TABLES)
    for name, (kind, shape) in graph.TABLES.items():
        assert tables[name].dtype == kind, name
        assert tables[name].ndim == len(shape), name
        assert all(n == m for n, m in zip(tables[name].shape, shape) if isinstance(m, int)), name


def test_metadata_is_read_without_onnx(path: Path, tmp_path: Path) -> None:
    with path.open("rb") as file:
        found = dict(inputs.read_metadata(file))
    assert found == {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert inputs.onnx_settings(found) == inputs.onnx_settings(path)
    for name, data in {"cut": path.read_bytes()[:100_000], "text": b"not a model", "empty": b""}.items():
        broken = tmp_path / name
        broken.write_bytes(data)
        with pytest.raises(ValueError, match=r"ONNX file|no entry"):
            inputs.onnx_settings(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image=np.zeros((3, 8, 8), np.float32)), "four axes"),
        (dict(image=np.zeros((1, 4, 8, 8), np.float32)), "3 channels"),
        (dict(features=np.zeros((2, 5, 2, 2), np.float32)), "batch size"),
        (dict(values=np.zeros((1, 5, 2, 3), np.float32)), "must share"),
        (dict(output_size=(0, 4)), "at least 1"),
        (dict(features=None), "features are missing"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str, path: Path) -> None:
    image, features = noise(1, (8, 8), (2, 2), 5)
    with pytest.raises(ValueError, match=message):
        anyup_core.onnx_inputs(path, **dict(image=image, features=features) | change)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.pb", {}, "can be .onnx"),
        ("nowhere/model.onnx", {}, "does not exist"),
        ("model.onnx", dict(dtype="bfloat16"), "float32, float16"),
        ("model.onnx", dict(image_size=(8, 8)), "needs image_size"),
        ("model.onnx", dict(image_size=(8, 8), features=(2, 2)), "needs image_size"),
        ("model.onnx", dict(image_size=(8, 0), features=(2, 2, 3)), "at least 1"),
        ("model.onnx", dict(encoder="resnet50"), "neither an EfficientNet-Lite"),
        ("model.onnx", dict(encoder="efficientnet_lite0", stride=8), "stride 8"),
    ],
)
def test_files_that_cannot_be_written(
    name: str, options: dict[str, Any], message: str, model: anyup_torch.AnyUp, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        anyup_torch.export_onnx(model, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [20, 128])
def test_jafar(channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = upsamplers.jafar.JAFAR(channels=channels).eval()
    path = anyup_torch.export_onnx(model, tmp_path / "jafar.onnx")
    for batch, sizes, size in ((1, ((48, 64), (3, 4)), None), (2, ((37, 41), (5, 6)), (50, 61))):
        image, features = noise(batch, *sizes, channels)
        close(
            run(path, anyup_core.onnx_inputs(path, image, features, size)), expected(model, image, features, size), 2e-5
        )
    with pytest.raises(ValueError, match=f"for {channels} channels"):
        anyup_core.onnx_inputs(path, image, features[:, :5])
    closed = anyup_torch.export_onnx(model, tmp_path / "closed.onnx", image_size=(16, 32), features=(2, 4, channels))
    image, features = noise(1, (16, 32), (2, 4), channels)
    output = runtime.InferenceSession(str(closed)).run(None, dict(image=image, features=features))[0]
    close(output, expected(model, image, features), 2e-5)


@pytest.mark.parametrize("settings", [dict(kernel_size=3, dim=32, num_heads=2, rope_heads=2), dict()])
def test_naf(settings: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = upsamplers.naf.NAF(**settings).eval()
    path = anyup_torch.export_onnx(model, tmp_path / "naf.onnx")
    cases = (
        (1, (48, 64), (9, 10), None),
        (2, (37, 41), (9, 12), (50, 61)),
        (1, (128, 100), (9, 9), (30, 27)),  # an image that is resized first
    )
    for batch, image_size, cells, size in cases:
        image, features = noise(batch, image_size, cells, 8)
        close(
            run(path, anyup_core.onnx_inputs(path, image, features, size)), expected(model, image, features, size), 2e-5
        )
    with pytest.raises(ValueError, match="multiple of"):
        anyup_core.onnx_inputs(path, image, features[:, :7])
    closed = anyup_torch.export_onnx(model, tmp_path / "closed.onnx", image_size=(18, 27), features=(9, 9, 8))
    image, features = noise(1, (18, 27), (9, 9), 8)
    output = runtime.InferenceSession(str(closed)).run(None, dict(image=image, features=features))[0]
    close(output, expected(model, image, features), 2e-5)
    with pytest.raises(ValueError, match="neighbourhood"):
        anyup_torch.export_onnx(model, tmp_path / "small.onnx", image_size=(18, 27), features=(2, 2, 8))


def test_other_upsamplers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="FeatUp cannot be written as ONNX"):
        anyup_torch.export_onnx(upsamplers.featup.FeatUp(), tmp_path / "featup.onnx")


def test_a_model_with_other_submodules_is_refused(tmp_path: Path) -> None:
    model = anyup_torch.AnyUp(qk_dim=32)
    model.query_encoder[1] = torch.nn.Identity()
    with pytest.raises(ValueError, match="query_encoder"):
        anyup_torch.export_onnx(model, tmp_path / "model.onnx")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    sizes = ["--image", "48", "64", "--features", "3", "4", "5"]
    assert cli.main(["export", WEIGHTS, str(path), *sizes, "--verify"]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("noise", "photograph", "largest difference"))
    assert path.exists()
    assert cli.main(["export", "efficientnet_lite0", str(tmp_path / "encoder.onnx"), "--dtype", "float16"]) == 0
    assert (tmp_path / "encoder.onnx").stat().st_size < 7e6


def test_the_command_for_jafar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    state = upsamplers.jafar.JAFAR(channels=8).state_dict()
    torch.save({"jafar": state}, tmp_path / "weights.pth")
    arguments = ["export", str(tmp_path / "weights.pth"), str(tmp_path / "jafar.onnx"), "--upsampler", "jafar"]
    assert cli.main([*arguments, "--image", "32", "48", "--features", "2", "3", "8", "--verify"]) == 0
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([WEIGHTS, "model.onnx", "--upsampler", "featup"], "AnyUp, jafar and naf are"),
        ([WEIGHTS, "model.xyz"], "says no format"),
        ([WEIGHTS, "model.pt2"], "give --image"),
        ([WEIGHTS, "model.stablehlo", "--image", "8", "8"], "give --image"),
        ([WEIGHTS, "model.onnx", "--dtype", "bfloat16"], "float32 or float16"),
        (["efficientnet_lite0", "model.onnx", "--verify"], "is an encoder"),
        (
            [WEIGHTS, "model.pt2", "--image", "8", "8", "--features", "2", "2", "3", "--encoder", "x"],
            "ONNX files alone",
        ),
    ],
)
def test_commands_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
