"""python -m convert."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import anyup_torch
import convert
from anyup_jax.cli import main as anyup
from convert import __main__ as cli
from convert import verify
from tests.weights import assert_same_bits, random_weights


@pytest.fixture
def path(tmp_path) -> Path:
    return convert.write(tmp_path / "x.pth", convert.Checkpoint(random_weights()))


def test_there_and_back_as_a_user_would(path, tmp_path):
    """In a process of its own; torch then loads the result strictly."""
    root = Path(convert.__file__).parents[1]
    for arguments in (["x.pth", "orbax", "--num-heads", "2"], ["orbax", "y.pt"]):
        paths = [str(tmp_path / word) if index < 2 else word for index, word in enumerate(arguments)]
        subprocess.run([sys.executable, "-W", "error", "-m", "convert", *paths], check=True, cwd=root)
    state = torch.load(tmp_path / "y.pt", weights_only=True)
    config = json.loads((tmp_path / "orbax" / "config.json").read_text())
    assert config["num_heads"] == 2
    model = anyup_torch.AnyUp(anyup_torch.AnyUpConfig(**config))
    model.load_state_dict(state, strict=True)
    assert path.read_bytes() == (tmp_path / "y.pt").read_bytes()


def test_options_are_kept(path, tmp_path, capsys):
    options = ["--window-ratio", "0.25", "--num-heads", "2", "--window", "natten"]
    assert cli.main([str(path), str(tmp_path / "y.safetensors"), *options]) == 0
    assert "window_ratio=0.25, num_heads=2, window=natten" in capsys.readouterr().out
    config = convert.read(tmp_path / "y.safetensors").config
    assert {"window_ratio": 0.25, "num_heads": 2, "window": "natten", "qk_dim": 16}.items() <= config.items()
    assert cli.main([str(tmp_path / "y.safetensors"), str(tmp_path / "z.pth")]) == 0
    assert "does not keep window_ratio=0.25, num_heads=2, window=natten" in capsys.readouterr().out
    assert_same_bits(convert.read(tmp_path / "z.pth").tensors, convert.read(path).tensors)


@pytest.mark.parametrize("name", ["y.safetensors", "y.pt", "y"])
def test_inspect_lists_every_tensor_in_both_names(path, tmp_path, capsys, name):
    convert.write(tmp_path / name, convert.read(path))
    assert cli.main([str(tmp_path / name), "--inspect"]) == 0
    printed = capsys.readouterr().out
    assert ("78 tensors" if name == "y" else "74 tensors") in printed
    assert f"{sum(x.size for x in convert.read(path).tensors.values()):,} parameters" in printed
    for torch_name, tensor in convert.read(path).tensors.items():
        assert torch_name in printed, tensor.shape
    for flax_name in convert.read(path).flax():
        assert flax_name in printed
    assert "24 x 1 x 3 x 3" in printed or name == "y"
    assert printed.count("unused") == 4
    assert "missing" not in printed


@pytest.mark.parametrize("flax", [False, True])
def test_inspect_shows_what_is_wrong_with_a_file(flax):
    from anyup_core.checkpoints import listing

    checkpoint = convert.Checkpoint(random_weights())
    tensors = dict(checkpoint.flax() if flax else checkpoint.tensors)
    tensors["extra"] = np.zeros(3, np.float32)
    tensors["rope.freqs"] = np.zeros((3, 16), np.float32)
    name = "image_encoder.conv.kernel" if flax else "image_encoder.0.weight"
    del tensors[name]
    notes = {line.flax if flax else line.torch: line.note for line in listing.lines(tensors, flax=flax)}
    assert notes["extra"] == "not in the table"
    assert notes["rope.freqs"] == "must be (2, 16)"
    assert notes[name] == "missing"
    assert sum(line.parameters for line in listing.lines(tensors, flax=flax)) == sum(x.size for x in tensors.values())


def test_verify_runs_both_frameworks(path, tmp_path, capsys):
    assert cli.main([str(path), str(tmp_path / "y"), "--verify", "--num-heads", "2"]) == 0
    printed = capsys.readouterr().out
    assert "largest difference between PyTorch and Flax: " in printed
    assert float(printed.split()[-1]) < 2e-5
    assert cli.main([str(path), "--verify"]) == 0


def test_verify_notices_other_weights():
    left, right = (convert.Checkpoint(random_weights(seed=seed)) for seed in (0, 1))
    assert verify.largest_difference(left, right) > 10 * verify.TOLERANCE


def test_verify_fails_loudly(path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "largest_difference", lambda *_: float("nan"))
    assert cli.main([str(path), "--verify"]) == 2
    assert "error: the frameworks differ by nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "y"], "none.pth does not exist"),
        (["anyupp", "y"], "Did you mean anyup"),
        (["x.pth", "x.pth"], "exists already; choose another name, or allow overwriting it (--overwrite)"),
        (["x.pth", "y.npz"], "has the suffix .npz"),
        (["x.pth", "no/y.pth"], "does not exist"),
        (["x.pth", "y", "--num-heads", "3"], "must be a multiple of num_heads=3"),
        (["x.pth", "y", "--window-ratio", "nan"], "must be a finite number"),
        ([".", "y"], "is no Orbax checkpoint of AnyUp"),
        (["x.txt", "y"], "x.txt is no Orbax checkpoint of AnyUp"),
    ],
)
def test_errors_are_one_sentence_and_status_2(path, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("no checkpoint")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert sorted(item.name for item in tmp_path.iterdir()) == ["x.pth", "x.txt"]


def test_overwrite(path, tmp_path):
    assert cli.main([str(path), str(tmp_path / "y")]) == 0
    assert cli.main([str(path), str(tmp_path / "y")]) == 2
    assert cli.main([str(path), str(tmp_path / "y"), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["x.pth"], "DST"),
        ([], "SRC"),
        (["x.pth", "y", "--weights", "z.pth"], "--timm"),
        (["x.pth", "y", "--training", "--inspect"], "--training"),
    ],
)
def test_usage(capsys, arguments, named):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error
    assert error.count("\n") == 1


def test_the_installed_command_is_the_same(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert anyup(["convert", "x.pth", "y.safetensors", "--num-heads", "2"]) == 0
    printed = capsys.readouterr().out
    assert cli.main(["x.pth", "y.safetensors", "--num-heads", "2", "--overwrite"]) == 0
    assert capsys.readouterr().out == printed
    assert cli.main(["y.safetensors", "--inspect"]) == 0
    listed = capsys.readouterr().out
    assert anyup(["inspect", "y.safetensors"]) == 0
    assert capsys.readouterr().out == listed


@pytest.mark.parametrize("option", ["--verify", "--training"])
def test_what_needs_a_checkout(path, tmp_path, capsys, option):
    assert anyup(["convert", str(path), str(tmp_path / "y"), option]) == 2
    error = capsys.readouterr().err
    assert option in error
    assert "checkout" in error
    assert not (tmp_path / "y").exists()
