"""Upsampled features to look into: a picture and settings in; pictures, similarities and segments out."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from anyup_core import visualize
from anyup_core.checkpoints import hub, names
from anyup_core.checks import check_memory, physical_memory
from anyup_core.encoders import catalogue as encoders
from anyup_core.files import read_image, resize_image, write_bands
from anyup_core.geometry import AxisWindow, axis_window
from anyup_core.upsamplers.catalogue import ANYUP, METHODS, NAMES
from anyup_jax.app import similarity
from anyup_jax.app.folder import WEIGHT_SUFFIXES, Folder
from anyup_jax.cli.models import encode
from anyup_jax.cli.parser import ENCODER, WEIGHTS
from anyup_jax.encoders.settings import EncoderConfig

Picture = UInt8[np.ndarray, "_ _ 3"]
Answer = tuple[dict[str, Any], dict[str, UInt8[np.ndarray, "_ _ ..."]]]
"""What JSON can say, and arrays of bytes."""

SIDES = (32, 2048)  # of output and image, least and most
NARROW = 14  # sides of a picture, the longer one by the shorter
SEGMENTS = 8
PICTURES = 4  # kept, so that as many windows of a browser can each have one
LARGE = 1 / 4  # of the memory: an output above it is written to disk, band by band, which takes several times as long
ALIKE = 0.8


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the page asks for.

    Attributes:
        encoder: timm's name of a Flax encoder, or timm:NAME.
        layer: block or stage of it.
        encoder_weights: a file of the folder; "" for the pretrained weights.
        encoder_side: longer side of the image that it sees, in pixels.
        upsampler: one of `NAMES`.
        weights: a name or a file of the folder; "" for AnyUp's default.
        side: longer side of the output, in pixels.
    """

    encoder: str = ENCODER
    layer: int = -1
    encoder_weights: str = ""
    encoder_side: int = 448
    upsampler: str = ANYUP
    weights: str = ""
    side: int = 448

    def __post_init__(self) -> None:
        for name in ("side", "encoder_side"):
            if not SIDES[0] <= getattr(self, name) <= SIDES[1]:
                raise ValueError(f"{name}={getattr(self, name)} must be from {SIDES[0]} to {SIDES[1]}.")
        if self.upsampler not in NAMES:
            raise ValueError(f"{self.upsampler!r} is no upsampler; the names are {', '.join(NAMES)}.")

    @classmethod
    def read(cls, values: Any) -> Settings:
        """Return the settings that JSON holds. Raises ValueError for names and values that are none."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not values.keys() <= set(known):
            raise ValueError(f"Settings are an object with the names {', '.join(known)}.")
        for name, value in values.items():
            kind = type(getattr(cls, name))
            if type(value) is not kind:
                raise ValueError(f"{name}={value!r} must be {'text' if kind is str else 'a whole number'}.")
        return cls(**values)


@dataclasses.dataclass
class Result:
    """The features of one picture, before and after, and what was asked about them.

    Attributes:
        number: of the result; questions name it, so that none is answered from another one.
        features, output: the maps.
        windows: of AnyUp's queries along both axes; None for other upsamplers.
        lengths: of the features before, interpolated, and after, once they are needed.
        seeds: number of pixels that are picked.
        nearest: of every position of the three maps, which of them is most similar, and its similarity.
    """

    number: int
    features: Float[np.ndarray, "h w C"]
    output: Float[np.ndarray, "H W C"]
    windows: tuple[AxisWindow, AxisWindow] | None
    lengths: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    seeds: int = 0
    nearest: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        return self.output.shape[0], self.output.shape[1]

    def similarities(self, y: int, x: int) -> dict[str, Float[np.ndarray, "_ _"]]:
        """Return the cosines of a pixel's feature to all positions of the three maps: low, bilinear, anyup."""
        if self.lengths is None:
            low, fine = similarity.norms(self.features), similarity.norms(self.output)
            self.lengths = low, similarity.bilinear_norms(self.features, self.size), fine
        cell = tuple(at * n // m for at, n, m in zip((y, x), self.features.shape, self.size))
        between = similarity.interpolated(self.features, self.size, (y, x))
        smooth = visualize.bilinear((self.features @ between)[..., None], self.size)[..., 0]
        asked = {
            "low": (self.features @ self.features[cell], self.features[cell]),
            "bilinear": (smooth, between),
            "anyup": (self.output @ self.output[y, x], self.output[y, x]),
        }
        lengths = dict(zip(asked, self.lengths))
        return {
            name: similarity.cosines(products, float(np.linalg.norm(query)), lengths[name])
            for name, (products, query) in asked.items()
        }

    def about(self, y: int, x: int) -> dict[str, Any]:
        """Return the cells that a pixel is made of, along both axes, and how many there are."""
        window = None
        if self.windows is not None:
            window = [seen(axis, at) for axis, at in zip(self.windows, (y, x))]
        return {"window": window, "cells": list(self.features.shape[:2])}


class Explorer:
    """A few pictures and the features of one, as pages show them. Calls of several threads are answered in turn.

    Args:
        folder: whose files may be opened.
        scratch: a folder for large outputs and for files that the page sends.
    """

    def __init__(self, folder: Folder, scratch: Path):
        self.folder, self.scratch = folder, scratch
        self.images: dict[int, Picture] = {}  # by their numbers, of which several pages may each have one
        self.result: Result | None = None
        self.sent: dict[str, Path] = {}  # weights by their names
        self.models: dict[str, tuple[Any, Any]] = {}  # of a kind the last one, with what it was made of
        self.count = 0  # of pictures, results and files that were sent
        self.lock = threading.Lock()

    def offers(self) -> dict[str, Any]:
        """Return what there is to choose from."""
        import jax

        pictures, weights, truncated = self.folder.listing()
        published = {name: list(method.config.published_names()) for name, method in METHODS.items()}
        weightless = {name: method.weightless for name, method in METHODS.items()}
        ours = sorted(names.NAMES, key=lambda name: name != WEIGHTS)  # the default one first
        upsamplers = {
            name: dict(names=published.get(name, ours), weightless=weightless.get(name, False)) for name in NAMES
        }
        return dict(
            pictures=pictures,
            encoders=encoders.names(),
            upsamplers=upsamplers,
            weightFiles=[*self.sent, *weights],
            weightSuffixes=list(WEIGHT_SUFFIXES),
            truncated=truncated,
            device=jax.devices()[0].device_kind,
        )

    def open(self, path: str | os.PathLike, name: str) -> dict[str, Any]:
        """Read a picture. Return its number, by which it is asked for, its name and its size.

        Raises:
            OSError, ValueError: for a file that is none, or one that is too narrow.
        """
        if not os.path.isfile(path):
            raise IsADirectoryError(f"{name or 'This'} is a folder, no picture.")
        image = read_image(path)
        height, width = image.shape[:2]
        if max(height, width) > NARROW * min(height, width):
            least = f"give one that is at most {NARROW} times as long as it is wide"
            raise ValueError(f"{name} is {width} x {height}, too narrow; {least}.")
        with self.lock:
            self.count += 1
            self.images[self.count] = image
            for oldest in [*self.images][:-PICTURES]:
                del self.images[oldest]
            return dict(picture=self.count, name=name, width=width, height=height)

    def keep(self, path: Path, name: str) -> dict[str, Any]:
        """Move a file of weights that was sent to the scratch folder; it replaces one of the same name."""
        with self.lock:  # a run may be reading the file that is replaced
            self.count += 1
            kept = path.replace(self.scratch / f"weights{self.count}{path.suffix}")
            if name in self.sent:
                self.sent[name].unlink(missing_ok=True)
            self.sent[name] = kept
        return dict(weights=name)

    def named(self, text: str) -> str:
        """Return a text with files that were sent called by their names instead of their paths here."""
        for name, path in [*self.sent.items()]:
            text = text.replace(str(path), name)
        return text

    def prepare(self, picture: int, settings: Settings) -> Answer:
        """Return a picture as it guides the output."""
        with self.lock:
            return {}, dict(guide=self._scaled(picture, settings.side))

    def _scaled(self, picture: int, side: int) -> Picture:
        if picture not in self.images:
            raise ValueError("This picture is kept no more, others have been opened since; open it again.")
        image = self.images[picture]
        scale = side / max(image.shape[:2])
        height, width = (max(2, round(n * scale)) for n in image.shape[:2])
        return resize_image(image, (height, width))

    def run(self, picture: int, settings: Settings) -> Answer:
        """Encode and upsample a picture. Return the three maps as joint PCA, and what they took.

        Raises:
            ValueError, TypeError, OSError, ImportError: as the encoders and upsamplers do.
        """
        with self.lock:
            self.result = None
            times: list[tuple[str, float]] = []
            start = time.perf_counter()

            def lap(name: str) -> None:
                nonlocal start
                times.append((name, 1000 * (time.perf_counter() - start)))
                start = time.perf_counter()

            guide = self._scaled(picture, settings.side)
            model, encoder = self._upsampler(settings), self._encoder(settings)
            lap("Models")
            features = np.ascontiguousarray(encode(encoder, self._scaled(picture, settings.encoder_side)), np.float32)
            lap("Encoder")
            output = self._upsample(model, guide, features)
            lap("Upsampler")
            pictures = drawn(features, output)
            lap("Pictures")
            windows = None
            if settings.upsampler == ANYUP:
                sizes = zip(guide.shape[:2], features.shape[:2])
                first, second = (axis_window(*n, model.config.window_ratio, model.config.window) for n in sizes)
                windows = first, second
            self.count += 1
            self.result = Result(self.count, features, output, windows)
            return dict(times=times, channels=features.shape[-1], result=self.count), pictures

    def _upsampler(self, settings: Settings) -> Any:
        from anyup_jax import upsamplers

        method, weights = settings.upsampler, settings.weights.strip()
        source: str | Path | None = weights or (WEIGHTS if method == ANYUP else None)
        known = names.NAMES if method == ANYUP else METHODS[method].config.published_names()
        if weights and weights not in known:
            source = self._file(weights, hub.is_name(weights))
        key = (method, str(source), changed(source))
        return self._kept("upsampler", key, lambda: upsamplers.from_pretrained(method, source))

    def _encoder(self, settings: Settings) -> Any:
        from anyup_jax.encoders.timm_bridge import PREFIX

        name, weights = settings.encoder.strip(), settings.encoder_weights.strip()
        if name.startswith(PREFIX) and not set("/\\:").isdisjoint(name.removeprefix(PREFIX)):
            raise ValueError(f"{name} must be timm: and the name of a timm model; files are given as its weights.")
        path = str(self._file(weights, False)) if weights else None
        config = EncoderConfig(name=name, weights=path, layer=(settings.layer,))
        return self._kept("encoder", (config, changed(path)), config.load)

    def _file(self, name: str, may_be_on_hub: bool) -> str | Path:
        if name in self.sent:
            return self.sent[name]
        try:
            return self.folder.path(name)
        except FileNotFoundError:
            if may_be_on_hub and not os.path.lexists(name):
                return name
            raise

    def _kept(self, kind: str, key: Any, load: Any) -> Any:
        if self.models.get(kind, (None, None))[0] != key:
            self.models.pop(kind, None)  # before the next one takes memory
            self.models[kind] = key, load()
        return self.models[kind][1]

    def _upsample(self, model: Any, guide: Picture, features: np.ndarray) -> Float[np.ndarray, "H W C"]:
        mean, std = (np.array(value, np.float32) for value in model.normalisation)
        image, size = ((guide / np.float32(255) - mean) / std)[None], guide.shape[:2]
        shape = (*size, features.shape[-1])
        needed = 4 * math.prod(shape)
        from anyup_jax import AnyUp

        if needed > LARGE * physical_memory() and isinstance(model, AnyUp):
            from anyup_jax.bands import upsample_bands

            bands = upsample_bands(model, image, features[None], size)
            path = self.scratch / "features.npy"
            path.unlink(missing_ok=True)
            write_bands(path, (band[0] for band in bands), shape, {})
            return np.load(path, mmap_mode="r")
        check_memory(f"An output of {size[1]} x {size[0]} pixels and {shape[-1]} channels", 3 * needed)
        from anyup_jax import upsamplers

        return np.asarray(upsamplers.upsample(model, image, features[None], size)[0], np.float32)

    def _asked(self, number: int, y: int, x: int) -> Result:
        """Return the result that is asked about. Raises ValueError if it is there no more, or has no such pixel."""
        result = self.result
        if result is None or result.number != number:
            raise ValueError("The features that were asked about have been replaced; reload the page.")
        height, width = result.size
        if not (0 <= y < height and 0 <= x < width):
            raise ValueError(f"The pixel x={x}, y={y} is not one of {width} x {height}.")
        return result

    def compare(self, number: int, y: int, x: int) -> Answer:
        """Return how similar a pixel's feature is to all others, as bytes, in the three maps."""
        with self.lock:
            result = self._asked(number, y, x)
            found = result.similarities(y, x)
            alike = float((found["anyup"] > ALIKE).mean())
            shades = {name: similarity.shade(values) for name, values in found.items()}
            return {"alike": alike, **result.about(y, x)}, shades

    def pick(self, number: int, y: int, x: int) -> Answer:
        """Add a pixel to those picked; return of every position which of them it is most similar to."""
        with self.lock:
            result = self._asked(number, y, x)
            if result.seeds == SEGMENTS:
                raise ValueError(f"There are {SEGMENTS} segments, no more are possible; clear them first.")
            for name, values in result.similarities(y, x).items():
                labels, best = result.nearest.get(name, (np.zeros(values.shape, np.uint8), values))
                result.nearest[name] = np.where(values > best, np.uint8(result.seeds), labels), np.maximum(values, best)
            result.seeds += 1
            answer = {"seeds": result.seeds, **result.about(y, x)}
            return answer, {name: labels for name, (labels, _) in result.nearest.items()}

    def clear(self, number: int) -> None:
        with self.lock:
            if self.result is not None and self.result.number == number:
                self.result.seeds, self.result.nearest = 0, {}

    def output(self, number: int) -> Float[np.ndarray, "H W C"]:
        """Return the upsampled features."""
        with self.lock:
            return self._asked(number, 0, 0).output


def seen(window: AxisWindow, query: int) -> list[int]:
    """Return the half-open range of cells that a query sees along an axis."""
    inside = np.flatnonzero(window.count[query])
    return [int(window.start[query] + at) for at in (inside[0], inside[-1] + 1)]


def changed(path: str | Path | None) -> int | None:
    """Return when a file was changed, None if there is none."""
    return os.stat(path).st_mtime_ns if path is not None and os.path.exists(path) else None


def drawn(
    features: Float[np.ndarray, "h w C"], output: Float[np.ndarray, "H W C"]
) -> dict[str, UInt8[np.ndarray, "_ _ 3"]]:
    """Return the features before, interpolated and after as joint PCA: coordinates are interpolated, not features."""
    basis = visualize.pca_basis([features])
    low, fine = basis.project(features), basis.project(output)
    smooth = visualize.bilinear(low, output.shape[:2])
    same = visualize.PCABasis(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
    return dict(zip(("low", "bilinear", "anyup"), visualize.pca_colors(low, smooth, fine, basis=same)))
