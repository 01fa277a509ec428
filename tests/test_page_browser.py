"""The page in Chromium: outputs are those of the same files in Python; it is isolated, works offline, names errors."""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anyup_core.export.encoders import METADATA
from anyup_core.export.inputs import onnx_inputs
from anyup_core.preprocessing import IMAGENET
from tests.chromium import CHROMIUM, SECONDS, browser, canvas, chosen, downloaded, dropped, give, needed, photograph
from tools import page as tool

RUNTIME = tool.ROOT / "web/runtime"
__all__ = ["browser"]  # a fixture
pytestmark = needed("onnxruntime", "onnx", files=RUNTIME)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(RUNTIME, folder / "runtime")
    tool.write(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    here, stop = serving(folder)
    yield here
    stop()


def serving(folder: Path) -> tuple[str, Callable[[], None]]:
    server = tool.server(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return f"http://127.0.0.1:{server.server_port}/", stop


@pytest.fixture(scope="module")
def opened(browser: Any, address: str) -> Iterator[Any]:
    """A page that shows its example, and whose console is silent to the end."""
    page, spoken = visit(browser, f"{address}#threads=2&side=112")
    yield page
    page.context.close()
    assert spoken == []


def visit(browser: Any, address: str, **options: Any) -> tuple[Any, list[str]]:
    page, spoken = browser.new_context(**options).new_page(), []
    page.set_default_timeout(SECONDS)
    page.on("console", lambda message: spoken.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: spoken.append(str(error)))
    began = time.monotonic()
    page.goto(address)
    page.wait_for_function("window.anyup && anyup.times.AnyUp > 0")
    print(f"first picture after {time.monotonic() - began:.1f} s, {page.evaluate('anyup.engine.threads')} threads")
    return page, spoken


def seen_by(page: Any, which: str) -> np.ndarray:
    """Return the pixels that a model saw, in [0, 1], NCHW."""
    script = """which => {
        const { data, width, height } = anyup.engine.pixels[which];
        let text = "";
        for (const byte of data) text += String.fromCharCode(byte);
        return [btoa(text), height, width];
    }"""
    text, height, width = page.evaluate(script, which)
    pixels = np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)[..., :3]
    return pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255


def normalised(image: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    return ((image - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))).astype(np.float32)


def compare_with_python(page: Any, folder: Path, stride: int, tolerance: float) -> tuple[int, int]:
    """Run the page's files in Python on what the page's models saw; return height and width of the output."""
    import onnxruntime

    found = np.load(io.BytesIO(downloaded(page, "#npy")))
    encoder, model = (
        onnxruntime.InferenceSession(folder / f"models/{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("lite0", "anyup")
    )
    settings = json.loads(encoder.get_modelmeta().custom_metadata_map[METADATA])
    image = normalised(seen_by(page, "seen"), settings["mean"], settings["std"])
    (features,) = encoder.run([f"stride{stride}"], {"image": image})
    guide = normalised(seen_by(page, "guide"), *IMAGENET)
    metadata = model.get_modelmeta().custom_metadata_map
    (expected,) = model.run(["hr"], onnx_inputs(metadata, guide, features))
    print(f"largest difference {abs(found - expected).max():.1e} of values up to {abs(expected).max():.1f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    return guide.shape[2:]


@pytest.mark.parametrize(
    ("stride", "side", "picture", "size"),
    [(16, 112, (300, 200), (80, 112)), (32, 224, (180, 240), (224, 160)), (16, 224, (500, 500), (224, 224))],
)
def test_the_output_is_that_of_the_files(
    stride: int, side: int, picture: tuple[int, int], size: tuple[int, int], opened: Any, folder: Path
) -> None:
    chosen(opened, stride=stride, side=side)
    give(opened, "waves.png", photograph(*picture))
    assert compare_with_python(opened, folder, stride, tolerance=1e-3) == size
    drawn = Image.open(io.BytesIO(downloaded(opened, "#png")))
    assert drawn.size == size[::-1]
    assert len(drawn.getcolors(1 << 20) or ()) > 100


def test_webgpu_gives_the_same(browser: Any, address: str, folder: Path) -> None:
    """WebGPU is emulated here, which takes minutes for a picture, so that its example is a strip of 112 x 16 pixels."""
    flags = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    chromium = browser.browser_type.launch(executable_path=CHROMIUM, args=["--no-sandbox", *flags])
    page, spoken = chromium.new_context(service_workers="block").new_page(), []
    page.set_default_timeout(5 * SECONDS)
    page.on("console", lambda message: spoken.append(f"{message.type}: {message.text}"))
    page.route("**/example.png", lambda route: route.fulfill(body=photograph(210, 30), content_type="image/png"))
    page.goto(f"{address}#backend=webgpu&side=112&stride=16")
    page.wait_for_function("window.anyup && anyup.times['AnyUp on the GPU'] > 0")
    assert page.evaluate("anyup.engine.note").endswith("and the GPU")
    compare_with_python(page, folder, stride=16, tolerance=5e-3)
    chromium.close()
    assert [line for line in spoken if "Service Worker registration blocked" not in line] == []


def header_only(width: int, height: int) -> bytes:
    """Return a PNG file of a size, whose pixels are not worth decoding."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(event: str, opened: Any) -> None:
    chosen(opened, side=112)
    script = """([kind, text]) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), carried = new DataTransfer();
        carried.items.add(new File([bytes], `${kind}.png`, { type: "image/png" }));
        const event = kind === "drop"
            ? new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: carried, bubbles: true });
        document.body.dispatchEvent(event);
        return anyup.idle();
    }"""
    opened.evaluate(script, [event, base64.b64encode(photograph(64, 48)).decode()])
    assert opened.inner_text("#status").startswith(f"{event}.png: 112 channels")


def test_a_picture_of_the_camera(opened: Any) -> None:
    chosen(opened, side=112)
    opened.click("#camera")
    opened.wait_for_function("document.querySelector('#video').videoWidth > 0")
    opened.click("#take")
    opened.evaluate("anyup.idle()")
    assert opened.inner_text("#status").startswith("camera.png: 112 channels")
    assert opened.evaluate("document.querySelector('#video').srcObject.getTracks()[0].readyState") == "ended"


def test_a_picture_after_a_mistake(opened: Any) -> None:
    chosen(opened, side=112)
    give(opened, "empty.png", b"")
    assert opened.is_visible("#error")
    give(opened, "waves.png", photograph(64, 48))
    assert opened.is_hidden("#error")


WRONG = {
    "cut off.png": lambda: photograph(64, 64)[:900],
    "noise.jpg": lambda: np.random.default_rng(0).bytes(4000),
    "begins well.jpg": lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "no pixels.png": lambda: header_only(64, 64),
    "large.png": lambda: header_only(10_000, 10_000),
    "narrow.png": lambda: photograph(600, 3),
    "empty.png": bytes,
    "letter.txt": lambda: b"Dear reader",
    "noise.onnx": lambda: np.random.default_rng(0).bytes(4000),
    "another.onnx": lambda: b"",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_of_no_use_is_one_sentence(name: str, opened: Any) -> None:
    times = opened.evaluate("anyup.times")
    assert times["AnyUp"] > 0
    give(opened, name, WRONG[name]())
    sentence = opened.inner_text("#error")
    assert sentence.startswith(name)
    assert sentence.endswith(".")
    assert sentence.count(". ") == 0
    assert opened.evaluate("anyup.times") == times  # the picture before it still stands
    if name == "large.png":
        assert "100 million" in sentence


def test_it_is_isolated_so_it_has_threads(opened: Any) -> None:
    assert opened.evaluate("crossOriginIsolated") is True
    assert opened.evaluate("anyup.engine.threads") == min(2, opened.evaluate("navigator.hardwareConcurrency"))


def test_pointing_compares_and_leaving_restores(opened: Any) -> None:
    chosen(opened, stride=16, side=112, mode="compare")
    before = canvas(opened, "anyup")
    opened.hover("#stage", position=dict(x=80, y=60))
    opened.wait_for_function("!document.querySelector('#stage .window').hidden")
    opened.evaluate("anyup.idle()")
    assert canvas(opened, "anyup") != before
    box, frame = opened.locator("#stage .window").bounding_box(), opened.locator("#stage").bounding_box()
    assert box["x"] <= frame["x"] + 80 <= box["x"] + box["width"]
    assert box["y"] <= frame["y"] + 60 <= box["y"] + box["height"]
    opened.hover("h1")
    opened.wait_for_function("document.querySelector('#stage .window').hidden")
    assert canvas(opened, "anyup") == before


def test_the_keyboard_suffices(opened: Any) -> None:
    chosen(opened, stride=16, side=112, mode="compare")
    before = canvas(opened, "anyup")
    opened.focus("#stage")
    opened.keyboard.press("Shift+ArrowRight")
    opened.wait_for_function("!document.querySelector('#stage .window').hidden")
    for count in (1, 2):
        opened.keyboard.press("Enter")
        opened.wait_for_function(f"document.querySelectorAll('#stage .seeds b').length === {count}")
        opened.keyboard.press("Shift+ArrowLeft")
        opened.keyboard.press("Shift+ArrowUp")
    assert opened.is_checked('input[name="mode"][value="segment"]')
    drawn = Image.open(io.BytesIO(base64.b64decode(canvas(opened, "low").partition(",")[2])))
    assert len(drawn.convert("RGB").getcolors() or ()) == 2
    opened.keyboard.press("Escape")
    opened.wait_for_function("document.querySelectorAll('.seeds b').length === 0")
    assert canvas(opened, "anyup") == before


def test_weights_of_ones_own(opened: Any, folder: Path) -> None:
    chosen(opened, stride=16, side=112)
    before = canvas(opened, "anyup")
    import onnx

    model = onnx.load(folder / "models/anyup.onnx")
    (entry,) = model.metadata_props
    entry.value = json.dumps(json.loads(entry.value) | dict(window_ratio=0.0))
    give(opened, "whole.onnx", model.SerializeToString())
    assert canvas(opened, "anyup") != before
    give(opened, "anyup.onnx", (folder / "models/anyup.onnx").read_bytes())
    assert canvas(opened, "anyup") == before


def test_the_address_keeps_the_settings_and_the_page_works_offline(browser: Any, folder: Path) -> None:
    here, stop = serving(folder.parent)  # as a host may have it: below another folder
    page, spoken = visit(browser, f"{here}{folder.name}/#stride=32&side=112&mode=segment&split=25")
    assert [page.is_checked(f'input[value="{value}"]') for value in ("32", "112", "segment")] == [True] * 3
    assert page.input_value("#split") == "25"
    chosen(page, stride=16)
    kept = dict(urllib.parse.parse_qsl(page.url.partition("#")[2]))
    assert kept == dict(stride="16", side="112", mode="segment", split="25")
    stop()
    page.reload()
    page.wait_for_function("window.anyup && anyup.times.AnyUp > 0")
    assert page.is_hidden("#error")
    assert [line for line in spoken if "ERR_CONNECTION_REFUSED" not in line] == []
    page.context.close()


def test_a_phone_without_service_worker(browser: Any, address: str) -> None:
    options = dict(viewport=dict(width=390, height=800), has_touch=True, is_mobile=True, service_workers="block")
    page, spoken = visit(browser, f"{address}#side=112&threads=2", **options)
    assert page.evaluate("[crossOriginIsolated, anyup.engine.threads]") == [False, 1]
    page.tap("#stage", position=dict(x=200, y=100))
    page.wait_for_function("!document.querySelector('#stage .window').hidden")
    page.context.close()
    assert [line for line in spoken if "Service Worker registration blocked" not in line] == []


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (768, "dark"), (1280, "light")])
def test_every_width_holds_the_page(
    width: int, scheme: str, browser: Any, address: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    options = dict(viewport=dict(width=width, height=800), color_scheme=scheme)
    page, spoken = visit(browser, f"{address}#side=112", **options)
    page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    print(tmp_path / f"{width}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()
    assert spoken == []


def test_a_picture_dropped_while_the_page_starts_is_kept(browser: Any, address: str) -> None:
    """It is not lost, and the example does not take its place."""
    page, spoken = browser.new_context(service_workers="block").new_page(), []
    page.set_default_timeout(SECONDS)
    page.on("pageerror", lambda error: spoken.append(str(error)))
    waiting: list[Any] = []
    page.route("**/files.json", lambda route: waiting.append(route))
    page.goto(f"{address}#side=112")
    page.wait_for_function("window.anyup !== undefined")
    dropped(page, "early.png")
    page.check('input[name="mode"][value="segment"]')
    page.check('input[name="side"][value="224"]')
    page.evaluate("location.hash = '#side=112'")
    while not waiting:
        page.wait_for_timeout(50)
    waiting[0].continue_()
    page.wait_for_function("anyup.times.AnyUp > 0")
    page.evaluate("anyup.idle()")
    assert page.inner_text("#status").startswith("early.png: ")
    assert page.is_hidden("#error")
    page.context.close()
    assert spoken == []
