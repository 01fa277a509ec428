"""Views of a split after an encoder and a method: computed whenever they are needed, or once and kept in files.

A view is an image, mirrored or not. A file holds one view: its features (float32), its labels, and what the method does
to it (float16, see `evaluation.kept_weights`); of a method that does not average its values, its output at the pixels
that count (float16) and their labels. It gets its name once it is complete, so runs may share a folder and a run that
was stopped goes on with the views that are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors import numpy as safetensors

from anyup_core.encoders.frozen import FrozenEncoder
from anyup_core.files import replacing
from anyup_core.settings import require
from evaluation import kept_weights
from evaluation.data.segmentation import Examples
from evaluation.kept_weights import Plan
from evaluation.methods import Guide, Method

LOGGED_EVERY = 20  # views
Arrays = dict[str, np.ndarray | Array]
Features = Float[Array, "B h w C"] | tuple[Float[Array, "B h w C"], Float[Array, "B C"]]


@dataclasses.dataclass(frozen=True)
class Live:
    """Views that are computed whenever they are needed."""

    split: Examples
    encoder: FrozenEncoder
    method: Method

    def batch(self, indices: Sequence[int], mirror: bool) -> tuple[Arrays, UInt8[np.ndarray, "B H W"]]:
        """Return the input of `upsample` for some views, and their labels, arranged as its output is."""
        images, labels = map(np.stack, zip(*(self.split.read(i, mirror) for i in indices)))
        features = encode(self.encoder, images, self.method.enlarge)
        thinned = np.stack([self.split.thinned(label, i, mirror) for label, i in zip(labels, indices)])
        return dict(image=_guide(self.method, images, labels), features=features), thinned

    def upsample(self, data: Arrays, low: Float[Array, "B h w K"] | None = None) -> Float[Array, "B H W _"]:
        """Upsample values, such as logits, with the weights that the method gives the features of a batch; or these."""
        return self.method(data["image"], data["features"], self.split.size, low)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """Put values of all pixels, arranged as the output of `upsample`, in rows and columns, (B, H, W)."""
        return values


@dataclasses.dataclass(frozen=True)
class Kept:
    """Views that were computed before; methods as in `Live`.

    Attributes:
        split, method: of which views, by which method.
        plan: how the output is cut into tiles; None where the method does the same to every image, or is not linear.
        folder: the files, each with the arrays "features", "labels" and, with a plan, "tiles" of a view; where the
            method is not linear, "outputs" and "labels".
    """

    split: Examples
    method: Method
    plan: Plan | None
    folder: Path

    def path(self, number: int) -> Path:
        """Return the file of a view."""
        return self.folder / f"{number:06}.view"

    def batch(self, indices: Sequence[int], mirror: bool) -> tuple[Arrays, UInt8[np.ndarray, "B ..."]]:
        """Raises ValueError if the file of a view is damaged, FileNotFoundError if it is gone."""
        views = [read_view(self.path(i * (1 + self.split.mirrored) + mirror)) for i in indices]
        arrays = {name: np.stack([view[name] for view in views]) for name in views[0]}
        return arrays, arrays.pop("labels")

    def upsample(self, data: Arrays, low: Float[Array, "B h w K"] | None = None) -> Float[Array, "B ... _"]:
        if not self.method.linear:
            return data["outputs"].astype(jnp.float32)
        assert low is not None, "the features at every pixel are not kept"
        if self.plan is None:
            return self.method(None, data["features"], self.split.size, low)
        return kept_weights.apply(self.plan, data["tiles"], low)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        assert self.method.linear, "its pixels are kept without their places"
        return values if self.plan is None else self.plan.untile(values, self.split.size)


Views = Live | Kept


def keep(
    split: Examples,
    encoders: Mapping[str, FrozenEncoder],
    method: Method,
    folder: Path,
    settings: Mapping[str, Any],
    log: Callable[[str], None] = print,
) -> dict[str, Kept]:
    """Compute the views that are not in files yet, for several encoders, which share what depends on the image only.

    Args:
        split: the images.
        encoders: a name for each encoder.
        method: what is done to their features.
        folder: holds a folder for each encoder, method and split.
        settings: for each encoder, all that the files depend on besides the split, as JSON values.
        log: receives lines on the progress, and on damaged files, which are computed again.

    Raises:
        ValueError: if the tiles cannot be divided by the split's `pixel_stride`.
        OSError: if a file cannot be read or written.
    """
    views = _digest([split.contents, split.size, split.mirrored, split.pixel_stride, split.seed])
    kept = {}
    for name, encoder in encoders.items():
        cells = tuple(method.enlarge * side // encoder.stride for side in split.size)
        plan = Plan.of(method, cells, split.size) if method.linear else None
        tile = (plan.rows.size, plan.cols.size) if plan else split.size
        remedy = f"take one that divides the tiles of {tile} pixels that outputs are cut into, or another dataset.size"
        possible = not any(side % split.pixel_stride for side in tile)
        require(possible, "probe.pixel_stride", split.pixel_stride, remedy)
        kept[name] = Kept(split, method, plan, folder / _digest([views, method.name, settings[name]]))
        kept[name].folder.mkdir(parents=True, exist_ok=True)
    computed: set[str] = set()
    count = len(split) * (1 + split.mirrored)
    for number in range(count):
        missing = {name: x for name, x in kept.items() if not _is_complete(x.path(number), log)}
        if missing:
            _compute(number, missing, encoders)
            computed |= set(missing)
        if computed and ((number + 1) % LOGGED_EVERY == 0 or number + 1 == count):
            names = ", ".join(name for name in encoders if name in computed)
            log(f"{method.name}: {number + 1} of {count} views of {names} computed")
    return kept


def read_view(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a kept view.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if its contents do not match their digest.
    """
    data = path.read_bytes()
    if data[:32] != _digest_view(path, data[32:]):
        raise ValueError(f"{path} is damaged; delete it, so that it is computed again.")
    return safetensors.load(data[32:])


def _is_complete(path: Path, log: Callable[[str], None]) -> bool:
    try:
        return path.exists() and bool(read_view(path))
    except ValueError:
        log(f"{path} is damaged and is computed again")
        return False


def _digest_view(path: Path, content: bytes) -> bytes:
    """Return the digest of a safetensors file, of its folder and of the view's number, which stands before the file."""
    return hashlib.sha256(f"{path.parent.name}/{int(path.stem)}/".encode() + content).digest()


def _compute(number: int, kept: Mapping[str, Kept], encoders: Mapping[str, FrozenEncoder]) -> None:
    """Write the files of a view for some of the encoders."""
    split, method = next((views.split, views.method) for views in kept.values())
    index, mirror = divmod(number, 1 + split.mirrored)
    image, label = split.read(index, bool(mirror))
    maps = {name: encode(encoders[name], image[None], method.enlarge) for name in kept}
    plans = {name: views.plan for name, views in kept.items() if views.plan}
    guide, pixels = _guide(method, image[None], label[None]), split.chosen(index, bool(mirror))
    tiles = kept_weights.extract(method, plans, guide, maps, split.size) if plans else {}
    outputs = {} if method.linear else method.upsample_many(guide, {k: (x, None) for k, x in maps.items()}, split.size)
    for name, views in kept.items():
        arrays = dict(features=np.asarray(maps[name][0]))
        if name in outputs:
            arrays = dict(outputs=np.asarray(outputs[name][0])[pixels].astype(np.float16), labels=label[pixels])
        elif (plan := views.plan) is None:
            arrays |= dict(labels=split.thinned(label, index, bool(mirror)))
        else:
            mask, labels = (plan.pick(x[None])[0] for x in (pixels, label))
            chosen = dict(labels=labels, tiles=np.asarray(tiles[name][0], np.float16))
            arrays |= {key: x[mask].reshape(len(mask), -1, *x.shape[2:]) for key, x in chosen.items()}
        path, content = views.path(number), safetensors.save(arrays)
        with replacing(path) as temporary:
            temporary.write_bytes(_digest_view(path, content) + content)


def _guide(method: Method, images: UInt8[np.ndarray, "B H W 3"], labels: UInt8[np.ndarray, "B H W"]) -> Guide:
    """Return the image or the labels, whichever guides the method."""
    return _pixels(images, 1) if method.guided_by == "image" else jnp.asarray(labels, jnp.int32)[..., None]


def encode(encoder: FrozenEncoder, images: UInt8[np.ndarray, "B H W 3"], enlarge: int = 1) -> Features:
    """Return the features of 8-bit images enlarged by a whole factor, and the class token if the encoder has it."""
    return encoder(encoder.normalize(_pixels(images, enlarge)))


@functools.partial(jax.jit, static_argnums=1)
def _pixels(images: UInt8[np.ndarray | Array, "B H W 3"], enlarge: int) -> Float[Array, "B eH eW 3"]:
    pixels = jnp.asarray(images, jnp.float32) / 255
    batch, height, width, _ = pixels.shape
    size = (batch, enlarge * height, enlarge * width, 3)
    return pixels if enlarge == 1 else jax.image.resize(pixels, size, "bilinear")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
