"""Small weight files that once went wrong, through every door: both frameworks and both uses of `convert`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import anyup_jax
import anyup_torch
import convert
from anyup_core.encoders.catalogue import find
from anyup_jax.encoders import create
from convert import __main__ as cli
from parity_tests.golden import SHARED

FAULTS = SHARED / "faults"
pytestmark = pytest.mark.skipif(not FAULTS.is_dir(), reason=f"no damaged files: {FAULTS} does not exist")

GOOD, AVERAGE, FLOAT8 = 736.12901, 745.33451, 736.78125  # sums of the absolute values of all tensors
COMES_OUT: dict[str, float | tuple[str, ...]] = {
    "weights_good.pth": GOOD,
    "w[best].safetensors": GOOD,
    "model_and_ema.pth": AVERAGE,
    "averaged_model.pth": GOOD,
    "prefix_net.pth": GOOD,
    "lightning_one_more_key.pth": GOOD,
    "float8_e4m3fn.pth": FLOAT8,
    "float8_e4m3fn.safetensors": FLOAT8,
    "all_nan.safetensors": math.nan,
    "one_infinity_float16.pth": math.inf,
    "holds_itself_model.pth": ("contains itself",),
    "holds_itself_anyup.pth": ("contains itself",),
    "stride_0.pth": ("more elements", "storage"),
    "colliding_keys.pth": ("keys",),
    "config_deep_list.safetensors": ("config_deep_list.safetensors",),
    "config_no_json.safetensors": ("config_no_json.safetensors",),
    "config_wrong_types.safetensors": ("num_heads",),
    "config_unknown_name.safetensors": ("foo",),
    "config_encoder_lines.safetensors": ("config_encoder_lines.safetensors", "encoder"),
}
LOGGED = {
    "model_and_ema.pth": "ema",
    "averaged_model.pth": "n_averaged",
    "lightning_one_more_key.pth": "loss.weight",
    "all_nan.safetensors": "NaN",
    "one_infinity_float16.pth": "infinite",
}


def options(path: Path) -> dict[str, int]:
    return {} if path.suffix == ".safetensors" else {"num_heads": 2}


def in_jax(path: Path, _: Path) -> list[np.ndarray]:
    return jax.tree.leaves(nnx.state(anyup_jax.from_pretrained(path, **options(path))))


def in_torch(path: Path, _: Path) -> list[np.ndarray]:
    return [x.numpy() for x in anyup_torch.from_pretrained(path, **options(path)).state_dict().values()]


def converted(path: Path, folder: Path) -> list[np.ndarray]:
    heads = ["--num-heads", "2"] if options(path) else []
    if status := cli.main([str(path), str(folder / "out.safetensors"), *heads]):
        raise ChildProcessError(status)
    return list(convert.read(folder / "out.safetensors").tensors.values())


def inspected(path: Path, _: Path) -> None:
    if status := cli.main([str(path), "--inspect"]):
        raise ChildProcessError(status)


@pytest.mark.parametrize("door", [in_jax, in_torch, converted, inspected])
@pytest.mark.parametrize("name", COMES_OUT)
def test_weights_load_or_one_sentence_says_why_not(
    name: str,
    door: Callable[[Path, Path], list[np.ndarray] | None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
    unchecked: None,
) -> None:
    right = COMES_OUT[name]
    if isinstance(right, float):
        tensors = door(FAULTS / name, tmp_path)
        if tensors is not None:
            total = sum(np.abs(np.asarray(x, np.float64)).sum() for x in tensors)
            np.testing.assert_allclose(total, right, rtol=1e-8)
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert (LOGGED.get(name, "") in "".join(said)) if name in LOGGED else not said
    else:
        with pytest.raises((ValueError, TypeError, ChildProcessError)) as refused:
            door(FAULTS / name, tmp_path)
        said = capsys.readouterr().err if refused.type is ChildProcessError else str(refused.value)
        assert all(word in said for word in right), said
        assert len(said.strip().splitlines()) <= 5, said
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "name", "owner"),
    [
        ("names_of_meta_dinov3_vits16.safetensors", "vit_small_patch16_dinov3", "Meta"),
        ("names_of_huggingface_dinov2_small.safetensors", "vit_small_patch14_dinov2", "Hugging Face"),
        ("names_of_huggingface_resnet50.safetensors", "resnet50", "Hugging Face"),
    ],
)
def test_names_of_others_are_said_to_be_theirs(file: str, name: str, owner: str) -> None:
    assert find(name)
    for build in (create, anyup_torch_create):
        with pytest.raises(ValueError, match=owner) as refused:
            build(name, weights=FAULTS / file)
        assert len(str(refused.value).splitlines()) <= 5


def anyup_torch_create(name: str, **settings: Path) -> object:
    from anyup_torch import encoders

    return encoders.create(name, **settings)
