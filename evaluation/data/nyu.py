"""NYUv2 with depth and surface normals, in the layout of Probe3D, read and augmented as Probe3D does.

Source: github.com/mbanani/probe3d, evals/datasets/nyu.py and data_processing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image, ImageEnhance

from anyup_core.files import is_hidden
from evaluation.config import DatasetConfig
from evaluation.data.cropping import centre, crop_image, crop_nearest
from evaluation.data.layouts import locate
from evaluation.data.pickled_arrays import read_arrays
from evaluation.data.split import Files, Split

NATIVE = (480, 640)
VARIABLES = ("img", "depth", "norm")  # of GeoNet's files
MAX_DEPTH = 10.0  # metres; larger depths count as unknown
TRAIN_FOLDERS = ("nyuv2_geonet", "nyu_geonet")  # of Probe3D's configuration, and of its instructions
TEST_FILES = ("nyuv2/nyuv2_snorm_all.pkl", "nyuv2_snorm_all.pkl")
COMPLETE = 30916
BAD = {
    6919: "bedroom_0129_r-1315328302.785180-1089784518.mat",
    21181: "library_0006_r-1300708259.539496-3335480784.mat",
}
"""Positions of the two bad files in the complete sorted folder, and their names."""
MEAN = (122.175, 116.169, 103.508)  # of R, G and B; GeoNet's files hold the image less twice of it
CONTENTS = (
    "nyuv2_geonet (the .mat files of data1.zip and data2.zip from github.com/xjqi/GeoNet) for training, and "
    "nyuv2/nyuv2_snorm_all.pkl for testing, which create_nyu_pkl.py of github.com/mbanani/probe3d makes of "
    "nyu_depth_v2_labeled.mat (from NYU) and nyuv2_surfacenormal_metadata.zip (from FAIR's self-supervision benchmark)"
)

JITTER, JITTERED = 0.2, 0.8  # largest change of brightness, contrast, saturation and hue (in turns); its probability
SMALLEST, CROPPED = 0.5, 0.5  # smallest share of the area that a crop has; its probability
ENHANCE = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color

Square = tuple[int, int, int]  # top, left, side
Planes = tuple[Shaped[np.ndarray, "480 640 3"], Shaped[np.ndarray, "480 640"], Shaped[np.ndarray, "480 640 3"]]


class Scene(NamedTuple):
    """A photograph and its geometry.

    Attributes:
        image: RGB, 8 bits.
        depth: in metres, up to 10; 0 where it is unknown. Probe3D neither trains nor scores anything there.
        normals: unit vectors; 0 where they or the depth are unknown.
    """

    image: UInt8[np.ndarray, "H W 3"]
    depth: Float32[np.ndarray, "H W"]
    normals: Float32[np.ndarray, "H W 3"]


class GeoNet(Files):
    """The .mat files of GeoNet, 30914 frames of the raw videos."""

    def planes(self, index: int) -> Planes:
        """Return the image, 8 bits, the depth in metres and the normals."""
        import scipy.io  # takes a second

        (name,) = self.names(index)
        path = self.root / name
        try:
            arrays = scipy.io.loadmat(path, variable_names=VARIABLES)
        except FileNotFoundError:
            raise
        except Exception as error:  # SciPy raises errors of any type for damaged files
            raise OSError(f"{path} is damaged or no MATLAB file: {error!r}.") from error
        if missing := set(VARIABLES) - set(arrays):
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
        image, depth, normals = (arrays[name][: NATIVE[0], : NATIVE[1]] for name in VARIABLES)
        _check(str(path), image, depth, normals)
        # Probe3D truncates, so a rounding error of the mean's subtraction can darken a pixel by one
        mean = np.array(MEAN, np.result_type(image.dtype, np.float32))
        return (image + 2 * mean).clip(0, 255).astype(np.uint8), depth, normals


@dataclasses.dataclass(frozen=True)
class Labelled:
    """The 654 test images of the labelled set, with the normals of Ladicky et al., numbered as there, from 0."""

    path: Path
    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays["test_indices"])

    def names(self, index: int) -> tuple[str, ...]:
        return (f"{self.path.name}#{self.arrays['test_indices'][index]}",)

    def contents(self, index: int) -> list[bytes]:
        return [plane.tobytes() for plane in self.planes(index)]

    def planes(self, index: int) -> Planes:
        number = int(self.arrays["test_indices"][index])
        image, depth, normals = (self.arrays[name][number] for name in ("images", "depths", "snorms"))
        return image.transpose(1, 2, 0), depth, normals.transpose(1, 2, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes(Split):
    """The scenes of a split."""

    source: GeoNet | Labelled

    def read(self, index: int, part: Square | None = None) -> Scene:
        """Return the square centre of a scene, resized: the image bilinearly (antialiased), the rest to the nearest.

        Args:
            index: which scene.
            part: top, left and side of a part of the centre, in its 480 x 480 pixels; None for the whole.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is not in Probe3D's layout.
        """
        top, left, side = part or (0, 0, NATIVE[0])
        left += centre(NATIVE, (NATIVE[0], NATIVE[0]))[1]
        image, depth, normals = (plane[top : top + side, left : left + side] for plane in self.source.planes(index))
        depth, normals = (crop_nearest(plane, self.size).astype(np.float32) for plane in (depth, normals))
        known = np.isfinite(depth) & (depth > 0) & (depth <= MAX_DEPTH)
        length = np.sqrt(np.square(normals, dtype=np.float64).sum(-1))
        directed = (known & np.isfinite(length) & (length > 0))[..., None]
        unit = np.divide(normals, length[..., None], out=np.zeros_like(normals), where=directed, casting="same_kind")
        picture = crop_image(Image.fromarray(np.ascontiguousarray(image)), self.size)
        return Scene(picture, np.where(known, depth, np.float32(0)), unit)


def open_nyu(config: DatasetConfig, split: Literal["train", "val"], limit: int | None = None) -> Scenes:
    """Return the scenes of a split; none is read yet.

    The splits are Probe3D's: "trainval" (the usual one for training: all of GeoNet's frames but two bad ones), of
    which "valid" is every 20th and "train" the rest, and "test" (the usual one for scoring).

    Args:
        config: its `root` holds the folder and the file that Probe3D uses; `train` and `val` override the splits.
        split: the split that probes are trained on, or the one that they are scored on.
        limit: use only the first scenes; None for all.

    Raises:
        FileNotFoundError: if the data is missing; the message says which files belong where.
        ValueError: if there is no such split, or the file has another layout than the one that Probe3D makes.
    """
    root, chosen = str(config.root), getattr(config, split) or {"train": "trainval", "val": "test"}[split]

    def place(names: Sequence[str]) -> Path:
        return locate(root, (Path(root, name) for name in names), f"has no {names[0]} for the split {chosen}", CONTENTS)

    if chosen == "test":
        return Scenes(source=_labelled(place(TEST_FILES)), size=config.size, limit=limit)
    if chosen not in ("trainval", "train", "valid"):
        raise ValueError(f"dataset.{split}={chosen} is no split of NYUv2; choose of trainval, train, valid, test.")
    folder = place(TRAIN_FOLDERS)
    files = sorted(path.name for path in folder.glob("*.mat") if not is_hidden(path.name))
    bad = {files[position] for position in BAD} if len(files) == COMPLETE else set(BAD.values())
    files = [name for name in files if name not in bad]
    if chosen != "trainval":
        files = [name for index, name in enumerate(files) if (index % 20 == 0) == (chosen == "valid")]
    if not files:
        raise FileNotFoundError(f"The split {chosen} in {folder} has no .mat files; {root} must hold {CONTENTS}.")
    return Scenes(source=GeoNet(folder, [(name,) for name in files]), size=config.size, limit=limit)


def _labelled(path: Path) -> Labelled:
    arrays = read_arrays(path, ("images", "depths", "snorms", "test_indices"))
    images, depths, normals, indices = arrays.values()
    if not images.ndim == normals.ndim == 4 or depths.ndim != 3 or not 0 < len(images) == len(depths) == len(normals):
        raise ValueError(
            f"{path} has images of shape {images.shape}, depths of {depths.shape} and snorms of {normals.shape}; "
            "Probe3D's are N x 3 x 480 x 640, N x 480 x 640 and N x 3 x 480 x 640."
        )
    if images.dtype != np.uint8:
        raise ValueError(f"{path} has images of {images.dtype}; Probe3D's are uint8.")
    _check(str(path), images[0].transpose(1, 2, 0), depths[0], normals[0].transpose(1, 2, 0))
    if indices.ndim != 1 or not len(indices) or not 0 <= indices.min() <= indices.max() < len(images):
        raise ValueError(f"{path} has test_indices of shape {indices.shape} that do not fit its {len(images)} images.")
    return Labelled(path, arrays)


def _check(name: str, image: np.ndarray, depth: np.ndarray, normals: np.ndarray) -> None:
    shapes = image.shape, depth.shape, normals.shape
    if shapes != ((*NATIVE, 3), NATIVE, (*NATIVE, 3)):
        raise ValueError(f"{name} has an image, depth and normals of shape {shapes}; NYUv2 has 480 x 640 pixels.")


def draw_part(rng: np.random.Generator) -> Square | None:
    """Draw a square with half to all of the area of the scene's centre square; with probability 1/2 None, all of it."""
    if rng.random() >= CROPPED:
        return None
    whole = NATIVE[0]
    side = round(whole * rng.uniform(SMALLEST, 1) ** 0.5)
    top, left = rng.integers(0, whole - side + 1, 2)
    return int(top), int(left), side


def jitter(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Change brightness, contrast, saturation and hue in a random order, by up to 0.2 each; nothing with p = 0.2."""
    if rng.random() >= JITTERED:
        return image
    picture = Image.fromarray(image)
    for change in rng.permutation(4):
        if change < 3:
            picture = ENHANCE[change](picture).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
        else:
            hue, *rest = picture.convert("HSV").split()
            turned = np.asarray(hue) + np.uint8(round(255 * rng.uniform(-JITTER, JITTER)) % 256)  # modulo 256
            picture = Image.merge("HSV", (Image.fromarray(turned), *rest)).convert("RGB")
    return np.asarray(picture)
