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
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from anyup_jax.app import folder as folders
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
    os.mkfifo(root / "pipe.png")
    return root


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def page(folder: Path, scratch: Path) -> Iterator[str]:
    """The address of the page."""
    explorer = Explorer(Folder(folder), scratch)
    with server.listen(0) as here, server.serving(explorer, here) as page:
        yield page


@pytest.fixture(scope="module")
def address(page: str) -> str:
    return page.partition("?")[0]


@pytest.fixture(scope="module")
def token(page: str) -> str:
    return page.partition("?token=")[2]


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


def opened(ask: Any, name: str = "below/a photo.png") -> int:
    """Open a picture of the folder; return its number."""
    status, answer = ask("open", {"file": name})
    assert status == 200, answer
    return answer["picture"]


@pytest.fixture(scope="module")
def ran(ask: Any) -> dict[str, Any]:
    """The answer for the photograph of the folder."""
    status, answer = ask("run", {**SETTINGS, "picture": opened(ask)})
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
    assert offers["pictures"] == ["broken.png", "out.png", "pipe.png", "below/a photo.png"]
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
    guide = ask("prepare", {**SETTINGS, "picture": opened(ask)})[1]["guide"]
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


def test_another_upsampler_and_sent_weights(scratch: Path, ask: Any) -> None:
    settings = {**SETTINGS, "picture": opened(ask)}
    status, answer = ask("run", {**settings, "upsampler": "nearest"})
    assert status == 200
    assert ask("compare", dict(result=answer["result"], y=0, x=0))[1]["window"] is None
    from anyup_core.checkpoints.names import SHIPPED

    content = SHIPPED[WEIGHTS].read_bytes()
    status, kept = ask(f"weights?name=..%2Fmine{SHIPPED[WEIGHTS].suffix}", content)
    assert (status, kept) == (200, dict(weights=f"mine{SHIPPED[WEIGHTS].suffix}"))
    assert kept["weights"] in ask("offers")[1]["weightFiles"]
    status, answer = ask("run", {**settings, "weights": kept["weights"]})
    assert status == 200, answer
    assert ask(f"weights?name={kept['weights']}", b"other")[0] == 200
    status, refused = ask("run", {**settings, "weights": kept["weights"]})
    assert (status, kept["weights"] in refused["error"], str(scratch) in refused["error"]) == (400, True, False)
    assert len(list(scratch.iterdir())) == 1  # of two files with one name, and no folder of either
    status, content = ask("compare", dict(result=answer["result"] - 1, y=0, x=0))
    assert (status, "replaced" in content["error"]) == (400, True)


def test_every_window_keeps_its_picture(folder: Path, ask: Any) -> None:
    """What another window opens is not what this one is shown, until more than a few are open."""
    first = opened(ask)
    second = ask("picture?name=a.png", png(30, 40))[1]["picture"]
    shapes = [ask("prepare", {**SETTINGS, "picture": picture})[1]["guide"].shape for picture in (first, second)]
    assert shapes == [(*SIZE, 3), (48, 36, 3)]
    assert ask("prepare", {**SETTINGS, "picture": first})[1]["guide"].std() > 0
    for _ in range(explorers.PICTURES - 1):
        opened(ask)
    status, answer = ask("prepare", {**SETTINGS, "picture": first})
    assert (status, "open it again" in answer["error"]) == (400, True)


def png(width: int, height: int) -> bytes:
    """Return a black picture."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_names_that_are_no_text_are_offered_and_opened(tmp_path: Path) -> None:
    """One such file must not keep the page from starting; a browser gives its name back as JSON does."""
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "scratch").mkdir()
    try:
        (tmp_path / name).write_bytes(png(8, 8))
    except OSError:
        pytest.skip("The file system takes names in UTF-8 alone.")
    explorer = Explorer(Folder(tmp_path), tmp_path / "scratch")
    with server.listen(0) as here, server.serving(explorer, here) as page:
        address, _, token = page.partition("?token=")
        status, content, _ = request(f"{address}api/offers", X_AnyUp_Token=token)
        assert (status, json.loads(content)["pictures"]) == (200, [name])
        body = json.dumps({"file": name}).encode()
        status, content, _ = request(f"{address}api/open", body, X_AnyUp_Token=token)
        assert (status, json.loads(content)["name"]) == (200, name)


def test_many_pictures_do_not_hide_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png", "c.png", "z.safetensors"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(folders, "LISTED", 2)
    assert Folder(tmp_path).listing() == (["a.png", "b.png"], ["z.safetensors"], True)


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not one without pictures. Root may list every folder, so the refusal is made here."""

    def refused(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):
        Folder(tmp_path)


def test_a_large_output_is_written_in_bands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorers, "LARGE", 0)
    explorer = Explorer(Folder(folder), tmp_path)
    picture = explorer.open(explorer.folder.path("below/a photo.png"), "photo")["picture"]
    answer, _ = explorer.run(picture, Settings(**SETTINGS))
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
        ("open", {"file": "\udcff.png"}, 400, "no file"),
        ("open", {"file": "\ud800x.png"}, 400, "no file"),
        ("open", {"file": "pipe.png"}, 400, "no file"),
        ("open", {"file": "below"}, 400, "below is a folder"),
        ("open", {"file": ""}, 400, "a folder"),
        ("open", {"file": "none.png"}, 400, "There is no file none.png"),
        ("open", {"file": "notes.txt"}, 400, "not an image"),
        ("open", {"file": "broken.png"}, 400, "damaged"),
        ("open", {"file": 3}, 400, "must be the name"),
        ("open", b"[", 400, "JSON object"),
        ("picture?name=x.png", b"no picture", 400, "x.png is not an image"),
        (f"picture?name=x.{'y' * 300}", b"no picture", 400, "y is not an image"),
        ("picture?name=x.%00png", b"no picture", 400, "png is not an image"),
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
        ("run", {**SETTINGS, "picture": 0}, 400, "open it again"),
        ("run", {**SETTINGS, "picture": None}, 400, "picture=None"),
        ("run", {**SETTINGS, "layer": 99}, 400, "99"),
        ("compare", {"result": 0, "y": 0, "x": 0}, 400, "replaced"),
        ("compare", {"result": 1, "y": 0}, 400, "result,y,x"),
        ("compare", {"result": 1, "y": 0.5, "x": 0}, 400, "y=0.5"),
        ("features.npy?result=x", None, 400, "whole number"),
    ],
)
def test_wrong_questions_are_answered_in_one_sentence(
    ask: Any, ran: dict[str, Any], scratch: Path, path: str, body: Any, status: int, said: str
) -> None:
    if path == "run":
        body = {"picture": opened(ask), **body}
    got, answer = ask(path, body)
    assert got == status
    assert said in answer["error"]
    assert "\n" not in answer["error"]
    assert str(scratch) not in answer["error"]
    assert not [entry for entry in scratch.iterdir() if entry.is_dir()]


def test_a_pixel_outside_is_refused(ran: dict[str, Any], ask: Any) -> None:
    number = ask("run", {**SETTINGS, "picture": opened(ask), "upsampler": "nearest"})[1]["result"]
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


def test_the_page_is_for_those_who_know_its_address(page: str, address: str, token: str) -> None:
    status, content, headers = request(page)
    assert (status, len(token)) == (200, 43)
    assert f'<meta name="anyup-server" content="{token}">' in content.decode()
    for other in ("", "index.html", "?token=", "?token=x", "index.html?token=%C3%A9"):
        status, content, _ = request(address + other)
        assert (status, token.encode() in content) == (403, False)
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Referrer-Policy"] == "no-referrer"
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
    # SIGINT is ignored where the suite runs in the background
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", heard, sys.executable, "-m", "anyup_jax", "app", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kept)


def test_the_command_serves_until_it_is_stopped(folder: Path) -> None:
    with run_command(str(folder), "--port", "0", env={**os.environ, "JAX_PLATFORMS": "cpu"}) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:[0-9]+/\?token=[\w-]+", process.stdout.readline())
        assert found
        assert str(folder) in process.stdout.readline()
        assert b"anyup-server" in request(found[0])[1]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")


def test_it_stops_at_once_while_it_computes(folder: Path) -> None:
    """Neither is the run waited for, nor does it crash in the clean-up of jax; the scratch folder is removed."""
    temporary = folder / ".temporary"
    temporary.mkdir()
    with run_command(
        str(folder), "--port", "0", env={**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(temporary)}
    ) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:[0-9]+/\?token=[\w-]+", process.stdout.readline())
        assert found
        address, _, token = found[0].partition("?token=")

        def ask(path: str, **body: Any) -> tuple[int, bytes, Any]:
            return request(f"{address}api/{path}", json.dumps(body).encode(), X_AnyUp_Token=token)

        picture = json.loads(ask("open", file="below/a photo.png")[1])["picture"]
        slow = dict(encoder="efficientnet_lite0", layer=0, encoder_side=2048, side=32)  # 20 s on a fast machine
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, "run", picture=picture, **slow)
            time.sleep(8)
            assert not answer.done()
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            _, err = process.communicate(timeout=60)
            assert time.monotonic() - began < 8
            assert answer.result()[0] == 503
    assert (process.returncode, err.strip()) == (130, "interrupted")
    assert list(temporary.iterdir()) == []


def test_open_without_a_browser_says_so(folder: Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "BROWSER": "none-at-all", "PATH": "", "DISPLAY": ""}
    with run_command(str(folder), "--port", "0", "--open", env=environment) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert lines[2].startswith("browser ")


def test_the_command_refuses_in_one_line(folder: Path) -> None:
    for arguments, said in (
        ([str(folder / "notes.txt")], "no folder"),
        (["--port", "70000"], "port from 0 to 65535"),
    ):
        with run_command(*arguments) as process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err.count("\n"), said in err) == (2, "", 1, True)
