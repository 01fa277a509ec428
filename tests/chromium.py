"""Chromium, in which the page is tested with a server and without one, and what both do with it."""

from __future__ import annotations

import base64
import importlib.util
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium")
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
SECONDS = 180_000  # in milliseconds, for a busy machine


def needed(*packages: str, files: Path | None = None) -> pytest.MarkDecorator:
    """Skip tests, by name, where Chromium, packages, or files that `make page` fetches are not there."""
    missing = [
        *(["chromium (make browser)"] if CHROMIUM is None else []),
        *(f"the package {name}" for name in ("playwright", *packages) if not importlib.util.find_spec(name)),
        *([] if files is None or files.is_dir() else [f"{files.parent.name}/{files.name} (make page)"]),
    ]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *CAMERA])


def give(page: Any, name: str, content: bytes) -> None:
    """Choose a file, and wait until the page has done with it."""
    page.set_input_files("#file", dict(name=name, mimeType="", buffer=content))
    page.evaluate("anyup.idle()")


def photograph(width: int, height: int) -> bytes:
    """Return a smooth picture with some edges, as a PNG file."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(17 * x + 5 * y), np.cos(23 * y * (1 + x)), np.sign(np.sin(9 * (x - y)))]
    pixels = (127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def chosen(page: Any, **settings: object) -> None:
    for field, value in settings.items():
        page.check(f'input[name="{field}"][value="{value}"]')
        page.evaluate("anyup.idle()")


def downloaded(page: Any, button: str) -> bytes:
    with page.expect_download() as download:
        page.click(button)
    return Path(download.value.path()).read_bytes()


def canvas(page: Any, panel: str) -> bytes:
    return page.evaluate("panel => document.querySelector(`.panels canvas[data-map=${panel}]`).toDataURL()", panel)


def dropped(page: Any, *names: str) -> None:
    """Drop pictures of these names at once, without waiting."""
    script = """([names, text]) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), carried = new DataTransfer();
        for (const name of names) carried.items.add(new File([bytes], name, { type: "image/png" }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(script, [names, base64.b64encode(photograph(64, 48)).decode()])


def until(page: Any, condition: str) -> None:
    """Wait, as `wait_for_function` does, which the policy of the page forbids."""
    for _ in range(SECONDS // 50):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise TimeoutError(condition)
