"""Views of a split after an encoder and a method: computed whenever they are needed, or once and kept in files.

A view is an image, mirrored or not. A file holds one view: its features (float32), its labels, and what the method does
to it (float16, see `evaluation.kept_weights`). It gets its name once it is complete, so runs may share a folder and a
run that was stopped goes on with the views that are missing.
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
from jaxtyping import Array, Bool, Float, UInt8
from safetensors import numpy as safetensors

from anyup_core.encoders.frozen import FrozenEncoder
from anyup_core.files import replacing
from evaluation import kept_weights
from evaluation.config import Size
from evaluation.data.segmentation import Examples
from evaluation.kept_weights import Plan
from evaluation.methods import Guide, Method

LOGGED_EVERY = 20  # views
Arrays = dict[str, np.ndarray | Array]
Features = Float[Array, "B h w C"] | tuple[Float[Array, "B h w C"], Float[Array, "B C"]]


@dataclasses.dataclass(frozen=True)
class Split:
    """A split and which of its pixels count.

    Attributes:
        examples: images and labels.
        size: height and width of both.
        limit: use only the first ones; None for all.
        mirrored: whether there are mirrored views too.
        pixel_stride: of every square of this many pixels a side, one counts; the others have the label `ignore`.
        seed: of the choice of pixels.
    """

    examples: Examples
    size: Size
    limit: int | None = None
    mirrored: bool = False
    pixel_stride: int = 1
    seed: int = 0

    def __len__(self) -> int:
        """Images."""
        return min(len(self.examples), self.limit or len(self.examples))

    @property
    def views(self) -> int:
        """Images, and their mirrored ones."""
        return len(self) * (1 + self.mirrored)

    def view(self, index: int, mirror: bool) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
        """Return image and label of a view, with the labels of all pixels."""
        image, label = self.examples.read(index)
        if mirror:
            image, label = image[:, ::-1], label[:, ::-1]
        return np.ascontiguousarray(image), np.ascontiguousarray(label)

    def thinned(self, label: UInt8[np.ndarray, "H W"], index: int, mirror: bool) -> UInt8[np.ndarray, "H W"]:
        """Return the label of a view with only the pixels that count."""
        if self.pixel_stride == 1:
            return label
        return np.where(self.chosen(index, mirror), label, self.examples.ignore).astype(np.uint8)

    def chosen(self, index: int, mirror: bool) -> Bool[np.ndarray, "H W"]:
        """Return which pixels of a view count."""
        stride = self.pixel_stride
        blocks = tuple(-(-side // stride) for side in self.size)
        pick = np.random.default_rng((self.seed, index, mirror)).integers(0, stride, (2, *blocks))
        mask = np.zeros([count * stride for count in blocks], bool)
        mask[np.arange(blocks[0])[:, None] * stride + pick[0], np.arange(blocks[1]) * stride + pick[1]] = True
        return mask[: self.size[0], : self.size[1]]

    @functools.cached_property
    def contents(self) -> str:
        """A digest of the stored images and labels, wherever they are."""
        return self.examples.digest(len(self))

    def digest(self) -> str:
        """Return the same for the same views of the same images."""
        return _digest([self.contents, self.size, self.mirrored, self.pixel_stride, self.seed])


@dataclasses.dataclass(frozen=True)
class Live:
    """Views that are computed whenever they are needed."""

    split: Split
    encoder: FrozenEncoder
    method: Method

    def batch(self, indices: Sequence[int], mirror: bool) -> tuple[Arrays, UInt8[np.ndarray, "B H W"]]:
        """Return what `logits` needs of some views, and their labels, in the arrangement of the logits."""
        images, labels = map(np.stack, zip(*(self.split.view(i, mirror) for i in indices)))
        features = encode(self.encoder, images, self.method.enlarge)
        thinned = np.stack([self.split.thinned(label, i, mirror) for label, i in zip(labels, indices)])
        return dict(image=_guide(self.method, images, labels), features=features), thinned

    def logits(self, data: Arrays, head: Float[Array, "C K"]) -> Float[Array, "B H W K"]:
        """Apply a linear head to the features at low resolution and upsample the result."""
        low = jnp.matmul(data["features"], head, precision="highest")
        return self.method(data["image"], data["features"], self.split.size, low)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """Put values of all pixels, arranged as the logits are, (B, ...), in rows and columns, (B, H, W)."""
        return values


@dataclasses.dataclass(frozen=True)
class Kept:
    """Views that were computed before; methods as in `Live`.

    Attributes:
        split, method: of which views, by which method.
        plan: how the output is cut into tiles; None where the method does the same to every image.
        folder: the files, each with the arrays "features", "labels" and, with a plan, "tiles" of a view.
    """

    split: Split
    method: Method
    plan: Plan | None
    folder: Path

    def batch(self, indices: Sequence[int], mirror: bool) -> tuple[Arrays, UInt8[np.ndarray, "B ..."]]:
        """Raises ValueError if the file of a view is damaged, FileNotFoundError if it is gone."""
        views = [read_view(self.folder, i * (1 + self.split.mirrored) + mirror) for i in indices]
        arrays = {name: np.stack([view[name] for view in views]) for name in views[0]}
        return arrays, arrays.pop("labels")

    def logits(self, data: Arrays, head: Float[Array, "C K"]) -> Float[Array, "B ... K"]:
        low = jnp.matmul(data["features"], head, precision="highest")
        if self.plan is None:
            return self.method(None, data["features"], self.split.size, low)
        return kept_weights.apply(self.plan, data["tiles"], low)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        return values if self.plan is None else self.plan.untile(values[..., None], self.split.size)[..., 0]


Views = Live | Kept


def keep(
    split: Split,
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
    kept = {}
    for name, encoder in encoders.items():
        cells = tuple(method.enlarge * side // encoder.stride for side in split.size)
        plan = Plan.of(method, cells, split.size)
        tile = (plan.rows.tile, plan.cols.tile) if plan else (split.pixel_stride,)
        if any(side % split.pixel_stride for side in tile):
            raise ValueError(
                f"probe.pixel_stride={split.pixel_stride} does not divide the tiles of {tile} pixels that outputs of "
                f"{split.size} are cut into; take one that does, or another dataset.size."
            )
        kept[name] = Kept(split, method, plan, folder / _digest([split.digest(), method.name, settings[name]]))
        kept[name].folder.mkdir(parents=True, exist_ok=True)
    computed: set[str] = set()
    for number in range(split.views):
        missing = [name for name in encoders if not _is_complete(kept[name].folder, number, log)]
        if missing:
            plans = {name: kept[name].plan for name in missing}
            views = _compute(split, number, {name: encoders[name] for name in missing}, method, plans)
            for name, arrays in views.items():
                _write_view(kept[name].folder, number, arrays)
            computed.update(missing)
        if computed and ((number + 1) % LOGGED_EVERY == 0 or number + 1 == split.views):
            names = ", ".join(name for name in encoders if name in computed)
            log(f"{method.name}: {number + 1} of {split.views} views of {names} computed")
    return kept


def read_view(folder: Path, number: int) -> dict[str, np.ndarray]:
    """Return the arrays of a kept view.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if its contents do not match their digest.
    """
    data = _path(folder, number).read_bytes()
    if data[:32] != _digest_view(folder, number, data[32:]):
        raise ValueError(f"{_path(folder, number)} is damaged; delete it, so that it is computed again.")
    return safetensors.load(data[32:])


def _write_view(folder: Path, number: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file behind a digest of it, of its folder and of the view's number."""
    content = safetensors.save(dict(arrays))
    with replacing(_path(folder, number)) as temporary:
        temporary.write_bytes(_digest_view(folder, number, content) + content)


def _is_complete(folder: Path, number: int, log: Callable[[str], None]) -> bool:
    try:
        return _path(folder, number).exists() and bool(read_view(folder, number))
    except ValueError:
        log(f"{_path(folder, number)} is damaged and is computed again")
        return False


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.view"


def _digest_view(folder: Path, number: int, content: bytes) -> bytes:
    return hashlib.sha256(f"{folder.name}/{number}/".encode() + content).digest()


def _compute(
    split: Split, number: int, encoders: Mapping[str, FrozenEncoder], method: Method, plans: Mapping[str, Plan | None]
) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of a view, for every encoder."""
    index, mirror = divmod(number, 1 + split.mirrored)
    image, label = split.view(index, bool(mirror))
    maps = {name: encode(encoder, image[None], method.enlarge) for name, encoder in encoders.items()}
    tiles = kept_weights.extract(method, plans, _guide(method, image[None], label[None]), maps, split.size)
    views: dict[str, dict[str, np.ndarray]] = {}
    for name, features in maps.items():
        views[name] = dict(features=np.asarray(features[0]))
        if (plan := plans[name]) is None:
            views[name] |= dict(labels=split.thinned(label, index, bool(mirror)))
        else:
            mask = plan.pick(split.chosen(index, bool(mirror))[None, ..., None])[0, ..., 0]
            chosen = [plan.pick(label[None, ..., None])[0, ..., 0], np.asarray(tiles[name][0], np.float16)]
            labels, weights = (values[mask].reshape(len(mask), -1, *values.shape[2:]) for values in chosen)
            views[name] |= dict(labels=labels, tiles=weights)
    return views


def _guide(method: Method, images: UInt8[np.ndarray, "B H W 3"], labels: UInt8[np.ndarray, "B H W"]) -> Guide:
    """Return what guides a method."""
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
