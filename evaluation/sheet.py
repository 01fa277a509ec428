"""The picture sheet of an encoder: a row for each image, with its truth and what each method's probe predicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from anyup_core.files import replacing

FILE = "predictions.npy"  # of a method, beside its result
IGNORED = (255, 255, 255)
COLOURS = 20  # of matplotlib's "tab20"; classes beyond share them

Paint = Callable[[np.ndarray], np.ndarray]  # predictions or truth -> a picture
Example = tuple[str, UInt8[np.ndarray, "H W 3"], np.ndarray]  # name, image and truth


def shown(count: int, wanted: int) -> tuple[int, ...]:
    """Return `wanted` of `count` images, evenly spread, in rising order; all if there are fewer."""
    wanted = min(count, wanted)
    return tuple((2 * i + 1) * count // (2 * wanted) for i in range(wanted))


def write(folder: Path, predictions: Shaped[np.ndarray, "N H W *_"]) -> None:
    """Write the predictions of a method that the sheet shows."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as temporary, temporary.open("wb") as file:
        np.save(file, predictions)


def read(folder: Path) -> Shaped[np.ndarray, "N H W *_"]:
    """Return the predictions of a method as a view of the file; none if there is no file."""
    path = folder / FILE
    return np.load(path, mmap_mode="r") if path.is_file() else np.empty((0, 0, 0))


def paint_classes(ignore: int) -> Paint:
    """Return a function that paints the first class black, the others in colours, and pixels without a label white."""
    from matplotlib import colormaps

    table = np.zeros((256, 3), np.uint8)
    table[1:] = 255 * colormaps["tab20"](np.arange(255) % COLOURS)[:, :3]
    table[ignore] = IGNORED
    return lambda classes: table[classes]


def paint_depth(depth: Float[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Paint depth from 0 (dark) to 10 metres; white where it is unknown."""
    from matplotlib import colormaps

    picture = (255 * colormaps["viridis"](depth / 10)[..., :3]).astype(np.uint8)
    picture[depth <= 0] = IGNORED
    return picture


def paint_normals(normals: Float[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Paint normals with x, y and z from -1 to 1 as red, green and blue; white where they are unknown."""
    picture = (127.5 * (normals + 1)).clip(0, 255).astype(np.uint8)
    picture[~normals.any(-1)] = IGNORED
    return picture


PAINT = dict(depth=paint_depth, normals=paint_normals)
