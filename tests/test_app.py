"""`anyup app`: what the page is answered, what it may open, and who else is answered nothing."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anyup_core import visualize
from anyup_core.files import read_image, resize_image
from anyup_core.preprocessing import normalize
from anyup_jax import from_pretrained
from anyup_jax.app import explorer as explorers
from anyup_jax.app import server, similarity
from anyup_jax.app.explorer import Explorer, Settings, seen
from anyup_jax.app.folder import Folder
from anyup_jax.cli.models import encode
from anyup_jax.cli.parser import WEIGHTS
from anyup_jax.encoders.settings import EncoderConfig

SETTINGS = dict(encoder="efficientnet_lite0", layer=-2, encoder_side=64, side=48)
SIZE = (48, 36)  # of the output for the photograph of the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photograph, weights, a link that leads out of it, and files that are neither."""
    outside, root = tmp_path_factory.mktemp("outside"), tmp_path_factory.mktemp("photographs")
    y, x = np.mgrid[:80, :60] / 60
    pixels = 127.5 + 100 * np.stack(
        [np.sin(17 * x + 5 * y), np.cos(23 * y * (1 + x)), np.sign(np.sin(9 * (x - y)))], -1
    )
    Image.fromarray(pixels.astype(np.uint8)).save(outside / "secret.png")
    (root / "below").mkdir()
    Image.fromarray(pixels.astype(np.uint8)).save(root / "below" / "a photo.png")
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("nothing")
    (root / "broken.png").write_bytes((root / "below" / "a photo.png").read_bytes()[:200])
    (root / "weights.safetensors").write_bytes(b"none")
    return root


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    explorer = Explorer(Folder(folder), tmp_path_factory.mktemp("scratch"))
    with server.listen(0) as here, server.serving(explorer, here) as address:
        yield address


@pytest.fixture(scope="module")
def token(address: str) -> str:
    _, text, _ = request(f"{address}index.html")
    found = re.search('<meta name="anyup-server" content="([^"]{43})">', text.decode())
    assert found
    return found[1]


def request(address: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
    asked = urllib.request.Request(address, body, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(asked, timeout=300) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


@pytest.fixture(scope="module")
def ask(address: str, token: str) -> Any:
    """Call the API; return the status and what JSON or the arrays say."""

    def ask(path: str, body: Any = None) -> tuple[int, Any]:
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        status, answer, headers = request(f"{address}api/{path}", content, X_AnyUp_Token=token)
        if "json" in headers["Content-Type"]:
            return status, json.loads(answer)
        return status, unpacked(answer)

    return ask


def unpacked(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<I", content[:4])
    answer = json.loads(content[4 : 4 + length])
    at = 4 + length
    for name, shape in answer.pop("arrays").items():
        count = int(np.prod(shape))
        answer[name] = np.frombuffer(content[at : at + count], np.uint8).reshape(shape)
        at += count
    assert at == len(content)
    return answer


@pytest.fixture(scope="module")
def ran(ask: Any) -> dict[str, Any]:
    """The answer for the photograph of the folder."""
    assert ask("open", {"file": "below/a photo.png"})[0] == 200
    status, answer = ask("run", SETTINGS)
    assert status == 200, answer
    return answer


def plain(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of the photograph, and these upsampled, without the app."""
    image = read_image(folder / "below" / "a photo.png")
    encoder = EncoderConfig(name="efficientnet_lite0", layer=(-2,)).load()
    features = encode(encoder, resize_image(image, (64, 48)))
    output = from_pretrained(WEIGHTS)(normalize(resize_image(image, SIZE))[None], features[None])
    return features, np.asarray(output[0])


def assert_near(ours: np.ndarray, expected: np.ndarray) -> None:
    """Compare to 2e-5 of values up to 4, in proportion above."""
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 5e-6 * np.abs(expected).max()


def test_it_offers_what_is_there(ask: Any) -> None:
    status, offers = ask("offers")
    assert status == 200
    assert offers["pictures"] == ["broken.png", "out.png", "below/a photo.png"]
    assert offers["weightFiles"][-1:] == ["weights.safetensors"]
    assert "vit_small_patch14_dinov2.lvd142m" in offers["encoders"]
    assert list(offers["upsamplers"])[:2] == ["anyup", "jafar"]
    assert offers["upsamplers"]["anyup"]["names"][0] == WEIGHTS
    assert "vit_small_patch14_dinov2.lvd142m" in offers["upsamplers"]["jafar"]["names"]
    assert offers["upsamplers"]["bicubic"] == dict(names=[], weightless=True)


def test_a_picture_is_upsampled_as_without_the_app(ran: dict[str, Any], folder: Path, ask: Any) -> None:
    features, output = plain(folder)
    assert ran["channels"] == features.shape[-1] == 112
    assert [ran[name].shape for name in ("low", "bilinear", "anyup")] == [(4, 3, 3), (*SIZE, 3), (*SIZE, 3)]
    for name, picture in explorers.drawn(features, output).items():
        assert np.abs(picture.astype(int) - ran[name]).max() <= 1, name
    assert [name for name, _ in ran["times"]] == ["Models", "Encoder", "Upsampler", "Pictures"]
    guide = ask("prepare", SETTINGS)[1]["guide"]
    assert np.array_equal(guide, resize_image(read_image(folder / "below" / "a photo.png"), SIZE))


def test_the_features_are_a_numpy_file(ran: dict[str, Any], folder: Path, address: str, token: str) -> None:
    status, content, headers = request(f"{address}api/features.npy?token={token}&result={ran['result']}")
    assert status == 200
    assert int(headers["Content-Length"]) == len(content)
    assert_near(np.load(io.BytesIO(content)), plain(folder)[1])


def test_similarities_are_cosines(ran: dict[str, Any], folder: Path, ask: Any) -> None:
    status, answer = ask("compare", dict(result=ran["result"], y=30, x=5))
    assert status == 200
    features, output = plain(folder)
    smooth = visualize.bilinear(features, SIZE)
    expected = {}
    for name, x, query in (
        ("low", features, features[2, 0]),
        ("bilinear", smooth, smooth[30, 5]),
        ("anyup", output, output[30, 5]),
    ):
        expected[name] = x @ query / np.linalg.norm(x, axis=-1) / np.linalg.norm(query)
        assert np.abs(255 * expected[name].clip(0, 1) - answer[name]).max() <= 1, name
    assert answer["alike"] == pytest.approx((expected["anyup"] > 0.8).mean(), abs=0.002)
    assert answer["cells"] == [4, 3]
    assert answer["window"] == [[2, 3], [0, 1]]


def test_segments_are_the_nearest_pick(ran: dict[str, Any], folder: Path, ask: Any) -> None:
    output = plain(folder)[1]
    picks = [(5, 5), (40, 30), (20, 10)]
    for count, (y, x) in enumerate(picks, 1):
        status, answer = ask("pick", dict(result=ran["result"], y=y, x=x))
        assert (status, answer["seeds"]) == (200, count)
    unit = output / np.linalg.norm(output, axis=-1, keepdims=True)
    similar = np.stack([unit @ unit[pick] for pick in picks])
    first, second = np.sort(similar, 0)[[-1, -2]]
    clear = first - second > 1e-5
    assert clear.mean() > 0.9
    assert np.array_equal(answer["anyup"][clear], similar.argmax(0)[clear])
    for _ in range(explorers.SEGMENTS - 3):
        assert ask("pick", dict(result=ran["result"], y=0, x=0))[0] == 200
    status, answer = ask("pick", dict(result=ran["result"], y=0, x=0))
    assert (status, "clear them first" in answer["error"]) == (400, True)
    assert ask("clear", {"result": ran["result"]}) == (200, {})
    assert ask("pick", dict(result=ran["result"], y=0, x=0))[1]["seeds"] == 1
    ask("clear", {"result": ran["result"]})


def test_another_upsampler_and_sent_weights(folder: Path, ask: Any) -> None:
    assert ask("open", {"file": "below/a photo.png"})[0] == 200
    status, answer = ask("run", {**SETTINGS, "upsampler": "nearest"})
    assert status == 200
    assert ask("compare", dict(result=answer["result"], y=0, x=0))[1]["window"] is None
    from anyup_core.checkpoints.names import SHIPPED

    content = SHIPPED[WEIGHTS].read_bytes()
    status, kept = ask(f"weights?name=..%2Fmine{SHIPPED[WEIGHTS].suffix}", content)
    assert (status, kept) == (200, dict(weights=f"mine{SHIPPED[WEIGHTS].suffix}"))
    assert kept["weights"] in ask("offers")[1]["weightFiles"]
    status, answer = ask("run", {**SETTINGS, "weights": kept["weights"]})
    assert status == 200, answer
    status, content = ask("compare", dict(result=answer["result"] - 1, y=0, x=0))
    assert (status, "replaced" in content["error"]) == (400, True)


def test_a_large_output_is_written_in_bands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorers, "LARGE", 0)
    explorer = Explorer(Folder(folder), tmp_path)
    explorer.open(explorer.folder.path("below/a photo.png"), "photo")
    answer, _ = explorer.run(Settings(**SETTINGS))
    output = explorer.output(answer["result"])
    assert isinstance(output, np.memmap)
    assert_near(output, plain(folder)[1])


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("open", {"file": "../x.png"}, 400, "outside of the folder"),
        ("open", {"file": "out.png"}, 400, "outside of the folder"),
        ("open", {"file": "/etc/passwd"}, 400, "outside of the folder"),
        ("open", {"file": "a\0b"}, 400, "no file"),
        ("open", {"file": "none.png"}, 400, "There is no file none.png"),
        ("open", {"file": "notes.txt"}, 400, "not an image"),
        ("open", {"file": "broken.png"}, 400, "damaged"),
        ("open", {"file": 3}, 400, "must be the name"),
        ("open", b"[", 400, "JSON object"),
        ("picture?name=x.png", b"no picture", 400, "x.png is not an image"),
        ("weights?name=x.txt", b"", 400, "no file of weights"),
        ("run", {**SETTINGS, "side": 4096}, 400, "side=4096"),
        ("run", {**SETTINGS, "side": "48"}, 400, "whole number"),
        ("run", {**SETTINGS, "colour": "red"}, 400, "names"),
        ("run", {**SETTINGS, "encoder": "efficientnet_lit0"}, 400, "efficientnet_lite0"),
        ("run", {**SETTINGS, "encoder": "timm:../x"}, 400, "timm model"),
        ("run", {**SETTINGS, "encoder": "timm:local-dir:x"}, 400, "timm model"),
        ("run", {**SETTINGS, "encoder_weights": "../w.pth"}, 400, "outside of the folder"),
        ("run", {**SETTINGS, "weights": "/etc/passwd"}, 400, "outside of the folder"),
        ("run", {**SETTINGS, "weights": "weights.safetensors"}, 400, "weights.safetensors"),
        ("run", {**SETTINGS, "upsampler": "jafar"}, 400, "jafar needs weights"),
        ("run", {**SETTINGS, "upsampler": "bilinear", "weights": "x"}, 400, "x"),
        ("run", {**SETTINGS, "upsampler": "none"}, 400, "no upsampler"),
        ("run", {**SETTINGS, "layer": 99}, 400, "99"),
        ("compare", {"result": 0, "y": 0, "x": 0}, 400, "replaced"),
        ("compare", {"result": 1, "y": 0}, 400, "result,y,x"),
        ("compare", {"result": 1, "y": 0.5, "x": 0}, 400, "y=0.5"),
        ("features.npy?result=x", None, 400, "whole number"),
    ],
)
def test_wrong_questions_are_answered_in_one_sentence(
    ask: Any, ran: dict[str, Any], path: str, body: Any, status: int, said: str
) -> None:
    got, answer = ask(path, body)
    assert got == status
    assert said in answer["error"]
    assert "\n" not in answer["error"]
    assert "scratch" not in answer["error"]


def test_a_pixel_outside_is_refused(ran: dict[str, Any], ask: Any) -> None:
    ask("open", {"file": "below/a photo.png"})
    number = ask("run", {**SETTINGS, "upsampler": "nearest"})[1]["result"]
    for y, x in ((48, 0), (0, 36), (-1, 0)):
        status, answer = ask("compare", dict(result=number, y=y, x=x))
        assert (status, "not one of 36 x 48" in answer["error"]) == (400, True)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "[::1]"])
def test_another_host_is_refused(address: str, host: str) -> None:
    for path in ("", "app.js", "api/offers"):
        assert request(f"{address}{path}", Host=host)[0] == 400


def test_without_the_token_nothing_is_answered(address: str) -> None:
    for path, body in (("offers", None), ("run", b"{}"), ("picture?name=a", b""), ("features.npy?result=1", None)):
        for wrong in ({}, {"X_AnyUp_Token": "x"}, {"X_AnyUp_Token": "\xe9"}):
            status, answer, _ = request(f"{address}api/{path}", body, **wrong)
            assert (status, json.loads(answer).keys()) == (403, {"error"})


def test_large_bodies_are_refused(address: str, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body is refused by its length if it tells it, and else once too much has come."""
    monkeypatch.setattr(server, "PICTURE", 1000)
    status, answer, _ = request(f"{address}api/picture", bytes(1001), X_AnyUp_Token=token)
    assert (status, "at most 1,000" in json.loads(answer)["error"]) == (413, True)
    host, port = address.removeprefix("http://").strip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST /api/picture HTTP/1.1\r\nHost: {host}\r\nX-AnyUp-Token: {token}\r\nConnection: close\r\n"
        chunk = b"200\r\n" + bytes(512) + b"\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + 4 * chunk + b"0\r\n\r\n")
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_the_page_keeps_other_sites_out(address: str) -> None:
    status, content, headers = request(address)
    assert status == 200
    assert b"<script" in content
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    for path in ("../pyproject.toml", "%2e%2e/config.py", "..%2fconfig.py"):
        assert request(address + path)[0] == 404


def test_only_this_machine_is_listened_to() -> None:
    with server.listen(0) as here:
        assert here.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match=f"Port {here.getsockname()[1]} cannot be used"):
            server.listen(here.getsockname()[1])


def test_interpolated_lengths_are_exact() -> None:
    features = np.random.default_rng(0).normal(size=(3, 5, 40)).astype(np.float32)
    smooth = visualize.bilinear(features, (11, 13))
    assert np.abs(similarity.bilinear_norms(features, (11, 13)) - np.linalg.norm(smooth, axis=-1)).max() < 1e-5
    assert np.abs(similarity.interpolated(features, (11, 13), (7, 12)) - smooth[7, 12]).max() < 1e-6


@pytest.mark.parametrize("window", ["paper", "natten"])
def test_the_cells_seen_are_those_of_the_window(window: str) -> None:
    from anyup_core.geometry import axis_window

    axis = axis_window(37, 9, 0.1, window)
    for query, row in enumerate(axis.dense()):
        inside = np.flatnonzero(row)
        assert seen(axis, query) == [inside[0], inside[-1] + 1]


def run_command(*arguments: str, **kept: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "anyup_jax", "app", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kept)


def test_the_command_serves_until_it_is_stopped(folder: Path) -> None:
    with run_command(str(folder), "--port", "0", env={**os.environ, "JAX_PLATFORMS": "cpu"}) as process:
        assert process.stdout is not None
        found = re.search("http://127.0.0.1:[0-9]+/", process.stdout.readline())
        assert found
        assert str(folder) in process.stdout.readline()
        assert b"anyup-server" in request(found[0])[1]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")


def test_the_command_refuses_in_one_line(folder: Path) -> None:
    for arguments, said in (
        ([str(folder / "notes.txt")], "no folder"),
        (["--port", "70000"], "port from 0 to 65535"),
    ):
        with run_command(*arguments) as process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err.count("\n"), said in err) == (2, "", 1, True)
