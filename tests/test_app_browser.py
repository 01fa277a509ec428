"""The page of `anyup app` in Chromium: Python computes, windows keep apart, links and errors."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anyup_core.checkpoints.names import SHIPPED
from anyup_jax.app import server as app
from anyup_jax.app.explorer import Explorer, drawn
from anyup_jax.app.folder import Folder
from tests.chromium import SECONDS, browser, canvas, chosen, downloaded, dropped, give, needed, photograph, until

__all__ = ["browser"]  # a fixture
pytestmark = needed("starlette", "uvicorn")


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Explorer, str]]:
    """The page of `anyup app`, for a folder with one picture."""
    pictures, scratch = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("scratch")
    (pictures / "below").mkdir()
    (pictures / "below/waves & more.png").write_bytes(photograph(90, 60))
    explorer = Explorer(Folder(pictures), scratch)
    with app.listen(0) as here, app.serving(explorer, here) as address:
        yield explorer, address


@pytest.fixture
def asked(browser: Any, application: tuple[Explorer, str]) -> Iterator[Any]:
    """The page with Python behind it, which has computed the picture on disk, and whose console is silent."""
    _, address = application
    page, spoken = browser.new_context(viewport=dict(width=1000, height=900)).new_page(), []
    page.set_default_timeout(SECONDS)
    page.on("console", lambda message: spoken.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: spoken.append(str(error)))
    page.goto(f"{address}#side=112&encoder_side=224&layer=-1&file=below/waves %26 more.png")
    until(page, "window.anyup && anyup.times.Upsampler > 0")
    yield page
    page.context.close()
    assert [line for line in spoken if "400 (Bad Request)" not in line] == []


def test_python_behind_the_page(asked: Any, application: tuple[Explorer, str]) -> None:
    explorer, _ = application
    said = re.findall(r"\w[^ :,]*", asked.inner_text("#status"))
    assert said[:5] == ["below/waves", "more.png", "320", "channels", "from"]
    assert [int(word) for word in said if word.isdecimal()] == [320, 7, 5, 112, 75]
    assert asked.is_hidden('input[name="stride"]')
    address = asked.url
    picture = Image.open(io.BytesIO(downloaded(asked, "#png"))).convert("RGB")
    assert explorer.result is not None
    expected = drawn(explorer.result.features, explorer.result.output)["anyup"]
    assert np.array_equal(np.asarray(picture), expected)
    assert np.array_equal(np.load(io.BytesIO(downloaded(asked, "#npy"))), explorer.result.output)
    asked.reload()  # the address keeps the file and the settings
    until(asked, "window.anyup && anyup.times.Upsampler > 0")
    assert asked.url == address
    assert asked.inner_text("#status").startswith("below/waves & more.png: 320 channels")


def test_other_settings_of_the_application(asked: Any) -> None:
    asked.fill('input[name="layer"]', "-3")
    asked.press('input[name="layer"]', "Enter")
    asked.evaluate("anyup.idle()")
    assert ": 40 channels" in asked.inner_text("#status")
    asked.select_option("#upsampler", "joint_bilateral")
    asked.evaluate("anyup.idle()")
    assert asked.inner_text(".panels figure:last-child figcaption") == "joint bilateral"
    asked.select_option("#upsampler", "naf")
    asked.evaluate("anyup.idle()")
    assert asked.inner_text("#error").startswith("naf needs weights")
    assert asked.is_disabled("#npy")
    asked.select_option("#upsampler", "anyup")
    asked.evaluate("anyup.idle()")
    assert asked.is_hidden("#error")
    give(asked, "sent.png", photograph(64, 48))
    assert asked.inner_text("#status").startswith("sent.png: 40 channels")
    name = f"mine{SHIPPED['anyup_efficientnet_lite'].suffix}"
    give(asked, name, SHIPPED["anyup_efficientnet_lite"].read_bytes())
    assert asked.input_value("#weights") == name
    assert asked.is_hidden("#error")
    give(asked, "letter.txt", b"Dear reader")
    assert asked.inner_text("#error") == "letter.txt is not an image that Pillow can read."


def test_pointing_at_pixels_of_the_application(asked: Any, application: tuple[Explorer, str]) -> None:
    explorer, _ = application
    before = canvas(asked, "anyup")
    asked.hover("#stage", position=dict(x=80, y=60))
    until(asked, "!document.querySelector('#stage .window').hidden")
    assert canvas(asked, "anyup") != before
    asked.hover("h1")
    until(asked, "document.querySelector('#stage .window').hidden")
    chosen(asked, mode="segment")
    for count, x in enumerate((80, 200), 1):
        asked.click("#stage", position=dict(x=x, y=60))
        until(asked, f"document.querySelectorAll('#stage .seeds b').length === {count}")
    assert explorer.result is not None
    assert explorer.result.seeds == 2
    picture = Image.open(io.BytesIO(base64.b64decode(canvas(asked, "low").partition(",")[2])))
    assert len(picture.convert("RGB").getcolors() or ()) == 2
    asked.click("#clear")
    until(asked, "document.querySelectorAll('.seeds b').length === 0")
    assert canvas(asked, "anyup") == before


def test_one_picture_of_several_is_opened(asked: Any) -> None:
    dropped(asked, "Straße 東京.png", "second.png")
    asked.evaluate("anyup.idle()")
    assert asked.inner_text("#status").startswith("Straße 東京.png: ")
    assert asked.inner_text("#error").startswith("Only Straße 東京.png is opened")
    assert "file=" not in asked.url  # what was dropped cannot be opened again
    with asked.expect_download() as download:
        asked.click("#png")
    assert download.value.suggested_filename == "Straße_東京_anyup.png"


def test_another_window_does_not_change_the_picture(
    asked: Any, browser: Any, application: tuple[Explorer, str]
) -> None:
    other = browser.new_context().new_page()
    other.set_default_timeout(SECONDS)
    other.goto(f"{application[1]}#side=112&encoder_side=224")
    until(other, "window.anyup && anyup.engine")
    give(other, "square.png", photograph(50, 50))
    chosen(asked, side=224)
    sizes = [re.search(r"to (\d+) \S (\d+) pixels", page.inner_text("#status")) for page in (other, asked)]
    assert [found and found.groups() for found in sizes] == [("112", "112"), ("224", "149")]
    other.hover("#stage", position=dict(x=80, y=60))
    until(other, "!document.querySelector('#error').hidden")
    assert "have been replaced" in other.inner_text("#error")
    other.click("#npy")
    until(other, "!document.querySelector('#error').hidden")
    assert "have been replaced" in other.inner_text("#error")
    other.context.close()


def test_settings_without_a_result_leave_no_pictures(asked: Any) -> None:
    """Those of before would be taken for the result of what is chosen now."""
    asked.select_option("#upsampler", "naf")
    asked.evaluate("anyup.idle()")
    assert asked.inner_text(".panels figure:last-child figcaption") == "NAF"
    sizes = "[...document.querySelectorAll('canvas')].map(canvas => [canvas.dataset.map, canvas.width])"
    assert {map for map, width in asked.evaluate(sizes) if width > 1} == {"image"}
    assert asked.is_hidden("#timings")
    asked.fill('input[name="layer"]', "-3")
    asked.fill('input[name="layer"]', "")
    asked.press('input[name="layer"]', "Enter")
    assert asked.input_value('input[name="layer"]') == "-2"
    assert "layer=-2" in asked.url


def test_segments_of_a_result_that_is_replaced_are_forgotten(asked: Any) -> None:
    chosen(asked, mode="segment")
    asked.evaluate("""() => {
        const frame = document.querySelector("#stage"), box = frame.getBoundingClientRect();
        for (const x of [50, 150]) {
            frame.dispatchEvent(new MouseEvent("click", { clientX: box.left + x, clientY: box.top + 50 }));
        }
        document.querySelector('input[name="side"][value="224"]').click();
    }""")
    asked.evaluate("anyup.idle()")
    assert asked.evaluate("document.querySelectorAll('.seeds b').length") == 0
    assert asked.is_disabled("#clear")
    assert asked.is_hidden("#error")


def test_weights_leave_the_picture_on_disk_chosen(asked: Any) -> None:
    name = f"own{SHIPPED['anyup_efficientnet_lite'].suffix}"
    give(asked, name, SHIPPED["anyup_efficientnet_lite"].read_bytes())
    assert asked.input_value("#disk") == "below/waves & more.png"
    assert f"weights={name}" in asked.url
    assert asked.locator(f'#weight-files option[value="{name}"]').count() == 1


def test_a_link_to_a_file_that_is_gone_says_so(browser: Any, application: tuple[Explorer, str]) -> None:
    page = browser.new_context().new_page()
    page.set_default_timeout(SECONDS)
    page.goto(f"{application[1]}#side=112&file=gone.png")
    until(page, "window.anyup && !document.querySelector('#error').hidden")
    assert page.inner_text("#error").startswith("There is no file gone.png")
    page.evaluate("location.hash = '#side=112&encoder_side=224&file=below/waves %26 more.png'")
    until(page, "anyup.times.Upsampler > 0")
    assert page.is_hidden("#error")
    page.context.close()


def test_without_its_server_the_page_says_so(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "a.png").write_bytes(photograph(64, 48))
    page, spoken = browser.new_context(viewport=dict(width=1000, height=900)).new_page(), []
    page.set_default_timeout(SECONDS)
    page.on("pageerror", lambda error: spoken.append(str(error)))
    with app.listen(0) as here, app.serving(Explorer(Folder(tmp_path), tmp_path / "scratch"), here) as address:
        page.goto(f"{address}#side=112&encoder_side=224&file=a.png")
        until(page, "window.anyup && anyup.times.Upsampler > 0")
        page.hover("#stage", position=dict(x=80, y=60))
        until(page, "!document.querySelector('#stage .window').hidden")
    actions = (lambda: page.hover("h1"), lambda: page.click("#npy"), lambda: chosen(page, side=224))
    for act in actions:
        page.evaluate("document.querySelector('#error').hidden = true")
        act()
        until(page, "!document.querySelector('#error').hidden")
        assert page.inner_text("#error").startswith("The server does not answer")
        assert page.is_hidden("#stage .window")
    page.context.close()
    assert spoken == []


def test_every_field_has_a_name(asked: Any) -> None:
    nameless = """() => [...document.querySelectorAll("button, input, select")]
        .filter((field) => !(field.ariaLabel || field.labels?.length || field.textContent.trim()))
        .map((field) => field.outerHTML)"""
    assert asked.evaluate(nameless) == []
    assert asked.evaluate("document.querySelector('[aria-busy]')") is None
    asked.click('input[name="side"][value="224"]')
    # what is busy may not be read out until it is done, so the status stands outside of it
    assert asked.evaluate("document.querySelector('#status').closest('[aria-busy]')") is None
    asked.evaluate("anyup.idle()")


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (768, "light"), (1280, "dark")])
def test_every_width_holds_the_application(
    width: int, scheme: str, browser: Any, application: tuple[Explorer, str], tmp_path: Path
) -> None:
    page = browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme).new_page()
    page.set_default_timeout(SECONDS)
    page.goto(f"{application[1]}#side=112")
    until(page, "window.anyup && anyup.engine")
    give(page, f"{'no_spaces_in_the_name_' * 8}.png", photograph(90, 60))
    page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    print(tmp_path / f"{width}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()
