"""The other upsamplers in JAX; and how their weights are found, read, converted and fetched."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from omegaconf import OmegaConf
from safetensors.numpy import save_file

import anyup_jax
import anyup_torch.upsamplers
from anyup_core.checkpoints import formats
from anyup_core.preprocessing import HALF, IMAGENET
from anyup_core.upsamplers import catalogue, sources
from anyup_core.upsamplers.checkpoint import UpsamplerCheckpoint
from anyup_jax import upsamplers
from anyup_jax.upsamplers import pretrained
from anyup_jax.upsamplers.featup import adaptive_conv
from tests import hub_server, release_server

TRAINED: dict[str, dict[str, Any]] = {
    "jafar": dict(channels=12, qk_dim=16, num_heads=2),
    "featup": dict(channels=12, channel_norm=True),
    "loftup": dict(channels=12),
    "naf": dict(dim=32, kernel_size=3, num_heads=2, rope_heads=2),
}
TOLD = {"jafar": dict(num_heads=2), "naf": dict(num_heads=2, kernel_size=3)}  # what a state dict does not tell


@functools.cache
def weights(method: str, **fields: Any) -> UpsamplerCheckpoint:
    """Random weights of which every one matters."""
    random, settings = np.random.default_rng(0), catalogue.find(method).config(**TRAINED[method] | fields)
    tensors = {}
    for row in settings.rows():
        values = random.normal(0, 0.3, row.shape).astype(np.float32)
        positive = row.torch.endswith(("norm.weight", "running_var", "periods", "sigma_spatial"))
        tensors[row.torch] = np.int64(3).reshape(()) if row.integer else 1 + 0.3 * abs(values) if positive else values
    return UpsamplerCheckpoint(method, tensors, vars(settings))


@functools.cache
def small(method: str) -> Any:
    if method == "anyup":
        return anyup_jax.AnyUp(qk_dim=16, num_heads=2, rngs=nnx.Rngs(0))
    return pretrained.build(weights(method)) if method in TRAINED else upsamplers.from_pretrained(method)


def inputs(image=(24, 32), cells=(3, 4), channels=12, batch=1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = (batch, *image, 3), (batch, *cells, channels)
    return tuple(random.standard_normal(shape, np.float32) for shape in shapes)


def close(left: Any, right: Any, tolerance: float = 1e-5) -> None:
    left, right = np.asarray(left), np.asarray(right)
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * max(1.0, float(np.abs(right).max())))


def first(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("method", upsamplers.NAMES)
class TestProtocol:
    def test_attributes(self, method: str) -> None:
        model = small(method)
        assert isinstance(model, upsamplers.Upsampler)
        assert model.channels == (12 if method in ("jafar", "featup", "loftup") else None)
        assert model.multiple == (2 if method == "naf" else 1)
        assert model.normalisation == IMAGENET
        assert model.native_size(*inputs()) == ((48, 64) if method == "featup" else (24, 32))

    def test_sizes_and_chunks(self, method: str) -> None:
        model = small(method)
        native = upsamplers.upsample(model, *inputs(batch=2))
        assert native.shape == (2, *model.native_size(*inputs()), 12)
        close(upsamplers.upsample(model, *inputs(batch=2), q_chunk_size=50), native)
        assert upsamplers.upsample(model, *inputs(), 30).shape == (1, 30, 30, 12)

    def test_frameworks_agree(self, method: str) -> None:
        if method == "anyup":
            theirs = anyup_torch.pretrained.build(anyup_jax.pretrained.checkpoint(small(method)))
        elif method in TRAINED:
            theirs = anyup_torch.upsamplers.pretrained.build(weights(method))
        else:
            theirs = anyup_torch.upsamplers.from_pretrained(method)
        with torch.no_grad():
            expected = theirs(*map(first, inputs(batch=2)), (21, 26)).permute(0, 2, 3, 1)
        tolerance = 2e-2 if method == "loftup" else 5e-5  # rounding of the resized image moves its phases
        close(upsamplers.upsample(small(method), *inputs(batch=2), (21, 26)), expected, tolerance)

    def test_output_has_the_type_of_the_features(self, method: str) -> None:
        image, features = inputs()
        output = upsamplers.upsample(small(method), image, jnp.asarray(features, jnp.bfloat16))
        assert output.dtype == jnp.bfloat16

    def test_bad_inputs_are_refused(self, method: str) -> None:
        model, (image, features) = small(method), inputs()
        for given, options, error in [
            ((image[0], features), {}, ValueError),
            ((first(image), features), {}, TypeError),
            ((image, features.astype(np.int32)), {}, TypeError),
            ((image[..., :2], features), {}, ValueError),
            ((image, features, (0, 4)), {}, ValueError),
            ((image, features), dict(q_chunk_size=0), ValueError),
        ]:
            with pytest.raises(error, match=r"\.$"):
                model(*given, **options)


@pytest.mark.parametrize("method", TRAINED)
class TestWeights:
    @pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
    def test_there_and_back(self, method: str, name: str, tmp_path: Path) -> None:
        path = formats.write(tmp_path / name, upsamplers.checkpoint(small(method)))
        model = upsamplers.from_pretrained(method, path, **TOLD.get(method, {}) if name.endswith(".pth") else {})
        assert model.config == small(method).config
        published = upsamplers.to_published(method, nnx.state(model))
        for key, tensor in weights(method).tensors.items():
            np.testing.assert_array_equal(published[key], tensor)
        with pytest.raises(ValueError, match=method):
            anyup_jax.from_pretrained(path)
        other = next(name for name in TRAINED if name != method)
        with pytest.raises(ValueError, match=f"{method}.*{other}"):
            upsamplers.from_pretrained(other, path)

    def test_gradients_have_the_published_names(self, method: str) -> None:
        def loss(model, image, features):
            return jnp.square(model(image, features, (20, 24))).sum()

        gradients = nnx.jit(nnx.grad(loss))(small(method), *map(jnp.asarray, inputs()))
        published = upsamplers.to_published(method, gradients)
        table = {row.torch: row for row in weights(method).rows if not row.unused and not row.integer}
        buffers = {key for key in table if key.endswith(("running_mean", "running_var", "periods"))}
        assert published.keys() == table.keys() - buffers
        for key, gradient in published.items():
            assert gradient.shape == table[key].shape
            assert np.isfinite(gradient).all()

    def test_damage_is_listed(self, method: str, tmp_path: Path) -> None:
        tensors = dict(weights(method).tensors)
        gone, longer = list(tensors)[3], list(tensors)[8]
        del tensors[gone]
        tensors[longer] = np.zeros((*tensors[longer].shape, 2), np.float32)
        save_file(tensors, tmp_path / "damaged.safetensors")
        with pytest.raises(ValueError, match=gone) as caught:
            upsamplers.from_pretrained(method, tmp_path / "damaged.safetensors")
        assert longer in str(caught.value)

    def test_settings_are_checked(self, method: str) -> None:
        make = type(small(method))
        with pytest.raises(TypeError, match="windows"):
            make(windows=1, rngs=nnx.Rngs(0))
        field = next(iter(TRAINED[method]))
        with pytest.raises(ValueError, match=f"{field}=0"):
            make(**{field: 0}, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=catalogue.find(method).config.published_names()[0]):
            upsamplers.from_pretrained(method)

    def test_random_weights(self, method: str) -> None:
        model = type(small(method))(rngs=nnx.Rngs(0), **TRAINED[method])
        assert np.isfinite(upsamplers.upsample(model, *inputs())).all()


def torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tensors_of(method: str, **fields: Any) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.array(x)) for key, x in weights(method, **fields).tensors.items()}


def layouts() -> dict[str, tuple[str, Any]]:
    """What the published trainers save."""
    encoder = {"model.0.blocks.0.weight": torch.zeros(2, 2)}
    featup, loftup = tensors_of("featup"), tensors_of("loftup")
    norm = {key.replace("channelnorm.norm", "model.1.norm"): x for key, x in loftup.items()}
    bare = {key.removeprefix("upsampler."): x for key, x in featup.items() if key.startswith("upsampler.")}
    ignored = {"downsampler.weight": torch.zeros(1), "scale_net.0.weight": torch.zeros(1)}
    cfg = OmegaConf.create(dict(model=dict(name="jafar")))
    jafar = dict(jafar=tensors_of("jafar"), optimizer_jafar={"state": {}}, epoch=3, cfg=cfg)
    return {
        "jafar": ("jafar", jafar),
        "data parallel": ("jafar", {f"module.{key}": x for key, x in tensors_of("jafar").items()}),
        "lightning": ("featup", dict(state_dict={**encoder, **featup, **ignored}, epoch=1)),
        "bare": ("featup", bare),
        "training": ("loftup", dict(state_dict={**encoder, **norm})),
        "plain": ("naf", tensors_of("naf")),
    }


@pytest.mark.parametrize("name", layouts())
def test_published_layouts(name: str, tmp_path: Path) -> None:
    method, content = layouts()[name]
    path = tmp_path / ("weights.ckpt" if name == "lightning" else "weights.bin")
    path.write_bytes(torch_bytes(content))
    found = sources.load(method, path, **TOLD.get(method, {}))
    for key, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor, weights(method).tensors[key])
    assert len(found.tensors) == len(weights(method).tensors) - 2 * (name == "bare")


def test_what_is_no_weights_is_refused(tmp_path: Path) -> None:
    lonely = {k.removeprefix("upsampler."): x for k, x in weights("loftup").tensors.items() if "channelnorm" not in k}
    save_file(lonely, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"channel norm.*pytorch_model\.bin"):
        upsamplers.from_pretrained("loftup", tmp_path / "model.safetensors")

    class Hostile:
        def __reduce__(self):
            return print, ("executed",)

    (tmp_path / "hostile.pth").write_bytes(torch_bytes({"jafar": Hostile()}))
    with pytest.raises(ValueError, match=r"print.*nothing in it was executed"):
        upsamplers.from_pretrained("jafar", tmp_path / "hostile.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        upsamplers.from_pretrained("naf", tmp_path / "none.pth")
    for method, source, named in [("jafr", "x", "jafar"), ("jafar", "vit", "vit_base_patch16_224")]:
        with pytest.raises(ValueError, match=named):
            upsamplers.from_pretrained(method, source)
    with pytest.raises(ValueError, match="no weights"):
        upsamplers.from_pretrained("bilinear", "weights.pth")
    with pytest.raises(ValueError, match="use_norm=False"):
        upsamplers.from_pretrained("featup", "maskclip")
    with pytest.raises(TypeError, match="windows"):
        upsamplers.from_pretrained("jafar", "vit_base_patch16_224", windows=3)


PUBLISHED = [("jafar", "vit_base_patch16_224", {}, "/jafar/vit_base_patch16_224.pth"),
             ("featup", "dinov2", {}, "/featup/dinov2_jbu_stack_cocostuff.ckpt"),
             ("featup", "maskclip", dict(use_norm=False), "/featup/no_norm/maskclip_jbu_stack_cocostuff.ckpt"),
             ("naf", "naf", {}, "/naf/naf_release.pth")]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "options", "path"), PUBLISHED)
def test_published_names_are_fetched_once(method, name, options, path, tmp_path, monkeypatch) -> None:
    channels = {"vit_base_patch16_224": 768, "dinov2": 384, "maskclip": 512}.get(name)
    fields = {"jafar": dict(channels=768), "featup": dict(channels=channels, channel_norm=options == {})}.get(
        method, {}
    )
    with release_server.serve(torch_bytes(tensors_of(method, **fields))) as server:
        monkeypatch.setenv("ANYUP_RELEASES", server.url)
        monkeypatch.setenv("ANYUP_CACHE", str(tmp_path))
        for _ in range(2):
            found = sources.load(method, name, **options)
        assert [asked for asked, _ in server.requests] == [path]
    assert found.settings.width == channels
    if method == "jafar":
        assert found.settings.normalisation == HALF
    with release_server.serve(torch_bytes(tensors_of("loftup"))) as server:
        monkeypatch.setenv("ANYUP_RELEASES", server.url)
        monkeypatch.setenv("ANYUP_CACHE", str(tmp_path / "other"))
        with pytest.raises(ValueError, match="loftup"):
            sources.load(method, name, **options)


def test_loftup_comes_from_the_hub(monkeypatch, tmp_path) -> None:
    with hub_server.serve(tmp_path, monkeypatch) as hub:
        hub.add("haiwen/loftup-dinov2s", {"pytorch_model.bin": torch_bytes(tensors_of("loftup", channels=384))})
        assert sources.load("loftup", "dinov2s").settings.width == 384
        hub.add("org/mine", {"pytorch_model.bin": torch_bytes(tensors_of("loftup"))})
        assert sources.load("loftup", "org/mine", file="pytorch_model.bin").settings.width == 12


def convert(*words: Any, status: int = 0) -> str:
    command = [sys.executable, "-m", "convert", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == status, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_convert(tmp_path: Path) -> None:
    formats.write(tmp_path / "naf.pth", weights("naf"))
    settings = "--num-heads", 2, "--kernel-size", 3
    text = convert("--upsampler", "naf", *settings, tmp_path / "naf.pth", tmp_path / "naf", "--verify")
    assert "largest difference" in text
    convert(tmp_path / "naf", tmp_path / "naf.safetensors")
    convert(tmp_path / "naf.safetensors", tmp_path / "again.pth")
    again = sources.load("naf", tmp_path / "again.pth", **TOLD["naf"])
    assert again.config == weights("naf").config
    assert sources.load("naf", tmp_path / "naf.safetensors").config == weights("naf").config
    assert "--upsampler naf" in convert(tmp_path / "naf.pth", tmp_path / "x.pth", status=2)
    assert "naf" in convert("--upsampler", "jafar", tmp_path / "naf.pth", tmp_path / "x.pth", status=2)
    assert "rope.periods" in convert("--inspect", tmp_path / "naf")


@pytest.mark.parametrize(
    ("kernel", "mode"), [("bilinear", "bilinear"), ("bicubic", "bicubic"), ("nearest", "nearest-exact")]
)
def test_interpolation_is_that_of_pytorch(kernel: str, mode: str) -> None:
    image, features = inputs(cells=(5, 7))
    aligned = {} if kernel == "nearest" else dict(align_corners=False)
    for size in ((24, 32), (3, 9)):
        expected = F.interpolate(first(features), size, mode=mode, **aligned).permute(0, 2, 3, 1)
        close(upsamplers.from_pretrained(kernel)(image, features, size), expected)


@pytest.mark.parametrize(("chunk", "side"), [(None, 7), (1, 3), (30, 5)])
def test_adaptive_convolution_is_its_definition(chunk: int | None, side: int) -> None:
    random = np.random.default_rng(0)
    padded = random.standard_normal((2, 10 + side - 1, 13 + side - 1, 3), np.float32)
    filters = random.standard_normal((2, 10, 13, side, side), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (1, 2))
    expected = np.einsum("byxij,byxcij->byxc", filters, windows)
    close(jax.jit(functools.partial(adaptive_conv, q_chunk_size=chunk))(padded, filters), expected)
    with pytest.raises(ValueError, match="square"):
        adaptive_conv(jnp.asarray(padded[:, 1:]), jnp.asarray(filters))


def test_naf_refuses_what_its_heads_or_its_neighbourhood_do_not_fit() -> None:
    for fields in (dict(channels=13), dict(cells=(2, 4)), dict(image=(2, 32))):
        with pytest.raises(ValueError, match="NAF"):
            small("naf")(*inputs(**fields))


def test_loftup_depends_on_the_batch_unless_told_otherwise() -> None:
    image, features = inputs(batch=2)
    image[1] *= 3
    for per_image in (False, True):
        model = pretrained.build(weights("loftup", per_image=per_image))
        alone = upsamplers.upsample(model, image[:1], features[:1])
        difference = np.abs(upsamplers.upsample(model, image, features)[:1] - alone).max()
        assert (difference < 2e-2) == per_image
