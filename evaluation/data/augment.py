"""The augmentation of Probe3D: other colours for the image, and a part of the scene for all of it."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from evaluation.data.nyu import NATIVE, Square

JITTER, JITTERED = 0.2, 0.8  # spread of brightness, contrast, saturation and hue (in turns), and how often
SMALLEST, CROPPED = 0.5, 0.5  # share of the area, and how often
ENHANCE = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color


def draw_part(rng: np.random.Generator) -> Square | None:
    """Draw a square of half to all of the scene's centre, anywhere in it; every other time None, the whole."""
    if rng.random() >= CROPPED:
        return None
    whole = NATIVE[0]
    side = round(whole * rng.uniform(SMALLEST, 1) ** 0.5)
    top, left = rng.integers(0, whole - side + 1, 2)
    return int(top), int(left), side


def jitter(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Change brightness, contrast, saturation and hue in a random order, by up to 0.2 each; sometimes nothing."""
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
