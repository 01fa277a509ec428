"""The augmentation of Probe3D: colour jitter of the image, and a crop of image, depth and normals."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from evaluation.data.nyu import NATIVE, Square

JITTER, JITTERED = 0.2, 0.8  # largest change of brightness, contrast, saturation and hue (in turns); its probability
SMALLEST, CROPPED = 0.5, 0.5  # smallest share of the area that a crop has; its probability
ENHANCE = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color


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
