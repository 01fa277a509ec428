"""What an encoder and a method make of a split of images: computed when it is asked for, or kept in files.

A view is an image, mirrored or not. Kept are its features (float32), its labels, and what the method does to it
(float16, see `evaluation.kept_weights`), in memory-mapped arrays that are filled view by view; filling that was
stopped goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from anyup_core.files import replacing
from evaluation import kept_weights
from evaluation.config import Size
from evaluation.data.segmentation import Examples
from evaluation.kept_weights import Plan
from evaluation.methods import Guide, Method

SAVED_EVERY = 20  # views


@dataclasses.dataclass(frozen=True)
class Split:
    """A split and which of its pixels count.

    Attributes:
        examples: images and labels.
        origin: data set, folder and split, so that those of others are not taken for these.
        size: of the images.
        limit: use only the first ones; None for all.
        mirrored: whether mirrored views are wanted too.
        pixel_stride: of every square of this many pixels a side, one counts; the others have the label `ignore`.
        seed: of the choice of pixels.
    """

    examples: Examples
    origin: tuple[str, ...]
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

    def digest(self) -> str:
        """The same for the same views of the same images."""
        names = [self.examples.name(i) for i in range(len(self))]
        return _digest([self.origin, names, self.size, self.mirrored, self.pixel_stride, self.seed])


@runtime_checkable
class Views(Protocol):
    """The views of a split as an encoder and a method leave them."""

    def batch(self, indices: Sequence[int], mirror: bool) -> tuple[dict[str, Any], UInt8[np.ndarray, "B ..."]]:
        """Return what `logits` needs of some views, and their labels, in the arrangement of the logits."""
        ...

    def logits(self, data: dict[str, Any], head: Float[Array, "C K"]) -> Float[Array, "B ... K"]:
        """Apply a linear head to the upsampled features: at low resolution, and what it gives is upsampled."""
        ...

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """Put values of all pixels, arranged as the logits are, (B, ...), in rows and columns, (B, H, W)."""
        ...


@dataclasses.dataclass(frozen=True)
class Live:
    """Views that are computed whenever they are asked for."""

    split: Split
    encoder: Any
    method: Method

    def batch(self, indices: Sequence[int], mirror: bool) -> tuple[dict[str, Any], UInt8[np.ndarray, "B H W"]]:
        """As `Views` has it."""
        images, labels = map(np.stack, zip(*(self.split.view(i, mirror) for i in indices)))
        features = encode(self.encoder, images, self.method.enlarge)
        thinned = np.stack([self.split.thinned(label, i, mirror) for label, i in zip(labels, indices)])
        return dict(image=_guide(self.method, images, labels), features=features), thinned

    def logits(self, data: dict[str, Any], head: Float[Array, "C K"]) -> Float[Array, "B H W K"]:
        """As `Views` has it."""
        low = jnp.matmul(data["features"], head, precision="highest")
        return self.method(data["image"], data["features"], self.split.size, low)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """As `Views` has it."""
        return values


@dataclasses.dataclass(frozen=True)
class Kept:
    """Views that were computed before.

    Attributes:
        split, method: of which views, by which method.
        plan: how the output is cut into tiles; None where the method does the same to every image.
        arrays: "features", "labels" and "tiles" (without a plan: not), by number of the view.
    """

    split: Split
    method: Method
    plan: Plan | None
    arrays: Mapping[str, np.ndarray]

    def batch(self, indices: Sequence[int], mirror: bool) -> tuple[dict[str, Any], UInt8[np.ndarray, "B ..."]]:
        """As `Views` has it."""
        numbers = [i * (1 + self.split.mirrored) + mirror for i in indices]
        found = {name: np.stack([array[i] for i in numbers]) for name, array in self.arrays.items()}
        return found, found.pop("labels")

    def logits(self, data: dict[str, Any], head: Float[Array, "C K"]) -> Float[Array, "B ... K"]:
        """As `Views` has it."""
        low = jnp.matmul(data["features"], head, precision="highest")
        if self.plan is None:
            return self.method(None, data["features"], self.split.size, low)
        return kept_weights.apply(self.plan, data["tiles"], low)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """As `Views` has it."""
        return values if self.plan is None else self.plan.untile(values[..., None], self.split.size)[..., 0]


def keep(
    split: Split,
    encoders: Mapping[str, Any],
    method: Method,
    folder: Path,
    about: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> dict[str, Kept]:
    """Compute all views for several encoders, which share what depends on the image only, and keep them in files.

    Args:
        split: the images.
        encoders: a name for each encoder.
        method: what is done to their features.
        folder: where the files are.
        about: what, besides the split, the files depend on: for each encoder, anything JSON can hold.
        say: where progress is told.

    Raises:
        ValueError: if the tiles cannot be divided by the split's `pixel_stride`.
        OSError: if the disk is full.
    """
    shapes = {
        name: (*(method.enlarge * side // encoder.stride for side in split.size), encoder.channels)
        for name, encoder in encoders.items()
    }
    plans = {name: Plan.of(method, shape[:2], split.size) for name, shape in shapes.items()}
    files = {name: folder / _digest([split.digest(), method.name, about[name]]) for name in encoders}
    missing = {name: path for name, path in files.items() if _done(path) < split.views}
    if missing:
        arrays = {name: _arrays(path, split, shapes[name], plans[name]) for name, path in missing.items()}
        first = min(map(_done, missing.values()))
        chosen = {name: plans[name] for name in missing}
        for number in range(first, split.views):
            views = _compute(split, number, {name: encoders[name] for name in missing}, method, chosen)
            for name, values in views.items():
                for key, value in values.items():
                    arrays[name][key][number] = value
            if (number + 1) % SAVED_EVERY == 0 or number + 1 == split.views:
                for name, path in missing.items():
                    for array in arrays[name].values():
                        array.flush()
                    _write(path, number + 1)
                say(f"{method.name}: {number + 1} of {split.views} views of {', '.join(missing)} computed")
    opened = {
        name: {key: np.load(path / f"{key}.npy", mmap_mode="r") for key in ("features", "labels", "tiles")
               if key != "tiles" or plans[name] is not None}
        for name, path in files.items()
    }  # fmt: skip
    return {name: Kept(split, method, plans[name], opened[name]) for name in encoders}


def _compute(split: Split, number: int, encoders: Mapping[str, Any], method: Method, plans: Mapping[str, Plan | None]):
    index, mirror = divmod(number, 2) if split.mirrored else (number, 0)
    image, label = split.view(index, bool(mirror))
    maps = {name: encode(encoder, image[None], method.enlarge) for name, encoder in encoders.items()}
    found: dict[str, dict[str, Any]] = {}
    tiles = kept_weights.extract(method, plans, _guide(method, image[None], label[None]), maps, split.size)
    for name, features in maps.items():
        if (plan := plans[name]) is None:
            found[name] = dict(features=features[0], labels=split.thinned(label, index, bool(mirror)))
        else:
            mask = plan.pick(split.chosen(index, bool(mirror))[None, ..., None])[0, ..., 0]
            found[name] = dict(
                features=features[0],
                labels=plan.pick(label[None, ..., None])[0, ..., 0][mask].reshape(len(mask), -1),
                tiles=np.asarray(tiles[name][0])[mask].reshape(len(mask), -1, plan.colours),
            )
    return found


def _guide(method: Method, images: UInt8[np.ndarray, "B H W 3"], labels: UInt8[np.ndarray, "B H W"]) -> Guide:
    """Return what a method is guided by."""
    return _pixels(images, 1) if method.guided_by == "image" else jnp.asarray(labels, jnp.int32)[..., None]


def encode(
    encoder: Any, images: UInt8[np.ndarray, "B H W 3"], enlarge: int = 1
) -> Float[Array, "B h w C"] | tuple[Float[Array, "B h w C"], Float[Array, "B C"]]:
    """Return what an encoder gives of 8-bit images, shown to it larger by a whole factor: features, and class token."""
    return encoder(encoder.normalize(_pixels(images, enlarge)))


@functools.partial(jax.jit, static_argnums=1)
def _pixels(images: UInt8[np.ndarray | Array, "B H W 3"], enlarge: int) -> Float[Array, "B eH eW 3"]:
    pixels = jnp.asarray(images, jnp.float32) / 255
    batch, height, width, _ = pixels.shape
    size = (batch, enlarge * height, enlarge * width, 3)
    return pixels if enlarge == 1 else jax.image.resize(pixels, size, "bilinear")


def _arrays(folder: Path, split: Split, shape: tuple[int, ...], plan: Plan | None) -> dict[str, np.ndarray]:
    """Open the files of an encoder, or create them."""
    kinds: dict[str, tuple[tuple[int, ...], Any]] = dict(features=(shape, np.float32), labels=(split.size, np.uint8))
    if plan is not None:
        stride, tile = split.pixel_stride, (plan.rows.tile, plan.cols.tile)
        if any(side % stride for side in tile):
            raise ValueError(
                f"probe.pixel_stride={stride} does not divide the tiles of {tile} pixels that outputs of {split.size} "
                "are cut into; take one that does, or another dataset.size."
            )
        tiles, positions = plan.grid[0] * plan.grid[1], plan.positions // stride**2
        kinds |= dict(labels=((tiles, positions), np.uint8), tiles=((tiles, positions, plan.colours), np.float16))
    if _done(folder):
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in kinds}
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (split.views, *shape))
        for name, (shape, dtype) in kinds.items()
    }


def _done(folder: Path) -> int:
    """Views that are complete in a folder."""
    path = folder / "progress.json"
    return json.loads(path.read_text())["views"] if path.is_file() else 0


def _write(folder: Path, done: int) -> None:
    with replacing(folder / "progress.json") as temporary:
        temporary.write_text(json.dumps(dict(views=done)))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
