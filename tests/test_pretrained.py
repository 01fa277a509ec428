"""from_pretrained in both frameworks, and fetching the published checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx

import anyup_jax.pretrained
import anyup_torch.pretrained
import convert
from anyup_core.checkpoints import fetching, names, torch_file
from parity_tests.golden import GOLDEN, needs_golden
from tests.release_server import drip, serve
from tests.weights import SMALL, random_weights

ROOT = Path(__file__).resolve().parents[1]
FILE = "anyup_paper.pth"


@pytest.fixture
def weights(tmp_path) -> bytes:
    """The bytes of a valid checkpoint."""
    torch_file.write(tmp_path / "valid.pth", random_weights())
    return (tmp_path / "valid.pth").read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ANYUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "DELAY", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def server(weights, cache, monkeypatch):
    with serve(weights) as server:
        monkeypatch.setenv("ANYUP_RELEASES", server.url)
        yield server


@nnx.jit
def forward(model, image, features):
    return model(image, features)


def outputs(source, **overrides) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of both models for a seeded input, NHWC."""
    random = np.random.default_rng(0)
    image, features = (random.standard_normal(shape).astype(np.float32) for shape in ((1, 18, 12, 3), (1, 6, 4, 5)))
    flax = forward(anyup_jax.pretrained.from_pretrained(source, **overrides), image, features)
    model = anyup_torch.pretrained.from_pretrained(source, **overrides)
    assert not model.training
    with torch.inference_mode():
        output = model(*(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (image, features)))
    return np.asarray(flax), output.numpy().transpose(0, 2, 3, 1)


def test_both_frameworks_agree_from_every_format(tmp_path):
    checkpoint = convert.Checkpoint(random_weights(), {"num_heads": 2, "window_ratio": 0.2})
    first = None
    for name in ("x.safetensors", "x"):
        flax, output = outputs(convert.write(tmp_path / name, checkpoint))
        np.testing.assert_allclose(flax, output, atol=2e-5)
        first = flax if first is None else first
        np.testing.assert_array_equal(flax, first)
    path = convert.write(tmp_path / "x.pth", checkpoint)
    flax, output = outputs(str(path), num_heads=2, window_ratio=0.2)
    np.testing.assert_array_equal(flax, first)
    assert np.abs(outputs(path, window="natten", num_heads=2)[0] - first).max() > 1e-3


@needs_golden
def test_the_golden_small_model():
    case = safetensors.numpy.load_file(GOLDEN / "small_config.safetensors")
    overrides = dict(num_heads=2, window_ratio=0.15)
    image, features, expected = (case[name] for name in ("image", "features", "output"))
    model = anyup_torch.pretrained.from_pretrained(GOLDEN / "weights_small.pth", **overrides)
    with torch.inference_mode():
        output = model(torch.from_numpy(image), torch.from_numpy(features), output_size=expected.shape[2:]).numpy()
    np.testing.assert_allclose(output, expected, atol=2e-5)
    assert image.shape[2:] == expected.shape[2:]
    model = anyup_jax.pretrained.from_pretrained(GOLDEN / "weights_small.pth", **overrides)
    output = forward(model, image.transpose(0, 2, 3, 1), features.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(np.asarray(output).transpose(0, 3, 1, 2), expected, atol=2e-5)


def test_parameters_are_float32_whatever_the_file_and_the_computation(tmp_path):
    path = convert.write(tmp_path / "x.pth", convert.Checkpoint(random_weights(dtype=np.float16)))
    model = anyup_jax.pretrained.from_pretrained(path, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    assert model.rope.freqs[...].dtype == jnp.float32
    assert model.config.lfu_dim == 24
    model = anyup_torch.pretrained.from_pretrained(path, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"cross_decode.cross_attn.attention.out_proj.{part}" for part in ("weight", "bias")]


@pytest.mark.parametrize("package", [anyup_jax.pretrained, anyup_torch.pretrained])
def test_overrides_that_cannot_be(tmp_path, package):
    path = convert.write(tmp_path / "x.pth", convert.Checkpoint(random_weights()))
    with pytest.raises(ValueError, match="qk_dim=64 contradicts the weights, whose shapes say qk_dim=16"):
        package.from_pretrained(path, qk_dim=64)
    with pytest.raises(TypeError, match="no field heads"):
        package.from_pretrained(path, heads=2)
    with pytest.raises(ValueError, match="must be a multiple of num_heads=3"):
        package.from_pretrained(path, num_heads=3)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("anyup_multibackbone", ValueError, "neither the name of a checkpoint.*Did you mean anyup_multi_backbone"),
        ("resnet", ValueError, r"nor an existing path\. The names are anyup, anyup_multi_backbone, "),
        ("weights.pth", FileNotFoundError, r"weights\.pth does not exist"),
        ("./anyup", FileNotFoundError, "anyup does not exist"),
        (Path("folder/anyup"), FileNotFoundError, "folder.anyup does not exist"),
    ],
)
def test_sources_that_do_not_exist(source, error, message, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        anyup_jax.pretrained.from_pretrained(source)


@pytest.mark.parametrize("name", list(names.RELEASES))
def test_a_published_checkpoint_is_fetched_once(server, cache, name):
    model = anyup_jax.pretrained.from_pretrained(name, num_heads=2)
    anyup_torch.pretrained.from_pretrained(name, num_heads=2)
    assert model.config.qk_dim == SMALL["D"]
    assert server.requests == [(f"/{names.RELEASES[name]}", "")]
    assert (cache / names.RELEASES[name].split("/")[1]).read_bytes() == server.content
    assert not list(cache.glob("*.part"))


def test_an_interrupted_transfer_is_resumed(server, cache):
    size = len(server.content)
    server.cut = [size // 3, size // 3]
    names.fetch("anyup")
    assert [asked for _, asked in server.requests] == ["", f"bytes={size // 3}-", f"bytes={size // 3 * 2}-"]
    assert (cache / FILE).read_bytes() == server.content


def test_what_an_earlier_process_left_is_resumed(server, cache):
    cache.mkdir()
    (cache / f"{FILE}.part").write_bytes(server.content[:1000])
    names.fetch("anyup")
    assert [asked for _, asked in server.requests] == ["bytes=1000-"]
    assert (cache / FILE).read_bytes() == server.content


@pytest.mark.parametrize("left", [b"another file" * 10, bytes(10**6)], ids=["shorter", "longer"])
def test_what_was_left_by_another_file_is_fetched_anew(server, cache, left):
    cache.mkdir()
    (cache / f"{FILE}.part").write_bytes(left)
    names.fetch("anyup")
    assert (cache / FILE).read_bytes() == server.content
    assert server.requests[-1][1] == ""


def test_a_host_without_ranges(server, cache):
    server.ranges, server.cut = False, [1000]
    names.fetch("anyup")
    assert (cache / FILE).read_bytes() == server.content


def test_passing_failures_are_tried_again(server, cache):
    server.statuses = [503, 429, 500]
    assert names.fetch("anyup").read_bytes() == server.content


def test_after_the_last_attempt_the_part_stays(server, cache):
    server.cut = [100] * fetching.ATTEMPTS
    with pytest.raises(ConnectionError, match=rf"ended after 400 of {len(server.content)} bytes.*put it at .*{FILE}"):
        names.fetch("anyup")
    assert not (cache / FILE).exists()
    assert (cache / f"{FILE}.part").stat().st_size == 100 * fetching.ATTEMPTS


def test_a_missing_file_is_not_asked_for_again(server, cache):
    server.statuses = [404]
    with pytest.raises(ConnectionError, match=rf"Could not fetch {server.url}/checkpoint/{FILE} \(HTTP Error 404"):
        names.fetch("anyup")
    assert len(server.requests) == 1


def test_offline_says_which_file_to_put_where(weights, cache, monkeypatch):
    monkeypatch.setenv("ANYUP_RELEASES", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError) as caught:
        anyup_torch.pretrained.from_pretrained("anyup")
    url, path = f"http://127.0.0.1:9/checkpoint/{FILE}", cache / FILE
    assert url in str(caught.value)
    assert str(caught.value).endswith(f"put it at {path}.")
    path.write_bytes(weights)
    assert anyup_torch.pretrained.from_pretrained("anyup").config.qk_dim == SMALL["D"]


def test_a_corrupted_file_never_gets_its_name(server, cache):
    middle = len(server.content) // 2
    flipped = bytes(byte ^ 255 for byte in server.content[middle : middle + 64])
    server.content = server.content[:middle] + flipped + server.content[middle + 64 :]
    with pytest.raises(ValueError, match=r"no usable checkpoint, and was deleted.*truncated or damaged"):
        names.fetch("anyup")
    assert {path.name for path in cache.iterdir()} <= {f"{FILE}.lock"}


def test_a_page_instead_of_a_file(server, cache):
    server.content = b"<html>sign in</html>"
    with pytest.raises(ValueError, match=r"no usable checkpoint, and was deleted.*is no PyTorch checkpoint"):
        names.fetch("anyup")
    assert not (cache / FILE).exists()


def test_another_models_weights(server, cache, tmp_path):
    torch.save({"conv.weight": torch.ones(3)}, tmp_path / "other.pth")
    server.content = (tmp_path / "other.pth").read_bytes()
    with pytest.raises(ValueError, match=r"not part of the model: conv\.weight"):
        names.fetch("anyup")
    assert not (cache / FILE).exists()


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_file_is_refused_and_not_run(server, cache, tmp_path):
    torch.save({"anyup": {}, "cfg": Evil(tmp_path / "executed")}, tmp_path / "evil.pth")
    server.content = (tmp_path / "evil.pth").read_bytes()
    with pytest.raises(ValueError, match=rf"mentions {os.name if os.name == 'nt' else 'posix'}\.system"):
        anyup_jax.pretrained.from_pretrained("anyup")
    assert not (tmp_path / "executed").exists()
    assert {path.name for path in cache.iterdir()} <= {f"{FILE}.lock"}


FETCH = "import sys; from anyup_core.checkpoints import names; print(names.fetch('anyup').stat().st_size)"


def test_two_processes_at_once(server, cache):
    """The second waits for the first and finds its file."""
    server.before = lambda: time.sleep(1.0)
    root = Path(convert.__file__).parents[1]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=dict(os.environ))
    processes = [subprocess.Popen([sys.executable, "-c", FETCH], **options) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert printed == [f"{len(server.content)}\n"] * 2
    assert len(server.requests) == 1
    assert (cache / FILE).read_bytes() == server.content


@pytest.mark.parametrize("part", ["headers", "content"])
def test_a_server_that_drips_is_given_up(cache, monkeypatch, part):
    """A byte every hundredth of a second, for half a second, and no second attempt."""
    monkeypatch.setattr(fetching, "PERIOD", 0.5)
    with drip(b"HTTP/1.1 200 OK\r\n" if part == "headers" else b"HTTP/1.1 200 OK\r\n\r\n") as (url, connections):
        monkeypatch.setenv("ANYUP_RELEASES", url)
        with pytest.raises(ConnectionError, match=r"less than 1000 bytes per second over 0\.5 seconds.*put it at"):
            names.fetch("anyup")
        assert len(connections) == 1
    assert not (cache / FILE).exists()


def test_who_waits_says_for_whom(server, cache, monkeypatch, capsys):
    monkeypatch.setattr(fetching, "PATIENCE", 0.1)
    started, waited = threading.Event(), threading.Event()
    server.before = lambda: started.set() or waited.wait(10)
    first = threading.Thread(target=names.fetch, args=["anyup"])
    first.start()
    assert started.wait(10)
    second = threading.Thread(target=names.fetch, args=["anyup"])
    second.start()
    time.sleep(0.5)
    waited.set()
    first.join()
    second.join()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"process {os.getpid()} on {socket.gethostname()}" in lines[0]
    assert FILE in lines[0]
    assert len(server.requests) == 1


def test_a_part_that_is_a_link_is_not_followed(server, cache, tmp_path):
    cache.mkdir()
    (tmp_path / "precious").write_bytes(b"kept")
    (cache / f"{FILE}.part").symlink_to(tmp_path / "precious")
    assert names.fetch("anyup").read_bytes() == server.content
    assert (tmp_path / "precious").read_bytes() == b"kept"


def test_the_cache_is_in_the_users_cache_directory(monkeypatch):
    monkeypatch.delenv("ANYUP_CACHE", raising=False)
    assert fetching.cache_directory().name == "anyup"


def test_published_addresses():
    urls = {name: f"{names.BASE_URL}/{path}" for name, path in names.RELEASES.items()}
    base = "https://github.com/wimmerth/anyup/releases/download"
    assert urls == {
        "anyup": f"{base}/checkpoint/anyup_paper.pth",
        "anyup_multi_backbone": f"{base}/checkpoint_v2/anyup_multi_backbone.pth",
    }


def test_a_progress_bar_is_shown_on_a_terminal(server, cache, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    names.fetch("anyup")
    assert FILE in capsys.readouterr().err


@pytest.mark.parametrize("name", list(names.SHIPPED))
def test_shipped_weights_are_the_same_model_in_both_frameworks(name, monkeypatch):
    monkeypatch.setenv("ANYUP_RELEASES", "http://127.0.0.1:9")  # nothing is fetched
    flax, torch_ = outputs(name)
    largest = np.abs(flax).max()
    np.testing.assert_allclose(torch_, flax, atol=1e-5 * largest)
    flat = np.abs(flax - flax.mean((1, 2), keepdims=True)).max()
    assert flat > 0.1 * largest  # it looks at the image
    hub = torch.hub.load(str(ROOT), name, source="local")
    assert hub.config == anyup_torch.pretrained.from_pretrained(name).config
    assert names.SHIPPED[name].stat().st_size < 4e6
    assert f"# {name}" in names.SHIPPED[name].with_suffix(".md").read_text()


def test_saved_config_of_an_orbax_checkpoint_reaches_the_model(tmp_path):
    path = convert.write(tmp_path / "x", convert.Checkpoint(random_weights(), {"num_heads": 2, "window": "natten"}))
    assert anyup_jax.pretrained.from_pretrained(path).config.window == "natten"
    assert anyup_torch.pretrained.from_pretrained(path, window="paper").config.window == "paper"
    assert json.loads((path / "config.json").read_text())["num_heads"] == 2
