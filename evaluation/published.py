"""Published scores, which an evaluation of the same data and encoder prints beside its own.

No run of this project has reproduced them. Sources: AnyUp, arXiv 2510.12764v2, tables 2 and 3; UPLiFT, arXiv
2601.17950, whose authors ran the other methods themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from evaluation.config import Config, EncoderConfig

DINOV2_S = "vit_small_patch14_dinov2"


class Figure(NamedTuple):
    """The published scores of a method.

    Attributes:
        method: its name in the paper.
        scores: by the names that an evaluation uses, from 0 to 1, in metres or in degrees.
        source: the paper and its table.
    """

    method: str
    scores: Mapping[str, float]
    source: str


METHODS = ("bilinear", "FeatUp", "LoftUp", "JAFAR", "AnyUp")  # the columns of the tables
ANYUP: dict[str, dict[str, tuple[float, ...]]] = {
    "cocostuff27": dict(
        mIoU=(0.5948, 0.6195, 0.6215, 0.6182, 0.6216), accuracy=(0.7932, 0.8114, 0.8132, 0.8107, 0.8137)
    ),
    "voc": dict(mIoU=(0.8143, 0.8337, 0.8369, 0.8436, 0.8400), accuracy=(0.9538, 0.9604, 0.9611, 0.9622, 0.9619)),
    "ade20k": dict(mIoU=(0.4054, 0.4219, 0.4202, 0.4206, 0.4243), accuracy=(0.7412, 0.7557, 0.7572, 0.7548, 0.7585)),
    "depth": dict(
        rmse=(0.4925, 0.4816, 0.4847, 0.4906, 0.4755), d1=(0.8081, 0.8156, 0.8127, 0.8052, 0.8216),
        aligned_rmse=(0.3582, 0.3413, 0.3478, 0.3481, 0.3378), aligned_d1=(0.9112, 0.9193, 0.9166, 0.9180, 0.9233),
    ),
    "normals": {
        "rmse": (32.70, 32.69, 33.94, 31.54, 31.17), "11.25": (0.26, 0.25, 0.26, 0.28, 0.29),
        "22.5": (0.53, 0.53, 0.51, 0.56, 0.57), "30": (0.66, 0.66, 0.64, 0.68, 0.69),
    },
}  # fmt: skip
UPLIFT: dict[str, dict[str, tuple[float, ...]]] = {
    "cocostuff27": dict(mIoU=(0.5941, 0.6177, 0.6219, 0.6171, 0.6208)),
    "voc": dict(mIoU=(0.8162, 0.8352, 0.8463, 0.8438, 0.8433)),
    "ade20k": dict(mIoU=(0.4043, 0.4207, 0.4216, 0.4196, 0.4225)),
    "cityscapes": dict(mIoU=(0.5971, 0.6050, 0.6209, 0.6189, 0.6133)),
}


def figures(config: Config, encoder: EncoderConfig) -> list[Figure]:
    """Return the published scores for the task, data and image size of an evaluation and one of its encoders."""
    segmentation = config.task == "segmentation"
    same = encoder.name.partition(".")[0].removeprefix("timm:") == DINOV2_S and encoder.layer in ((-1,), (11,))
    same = same and encoder.norm == segmentation  # Probe3D uses the features before the norm
    if not same or config.limit is not None or config.dataset.size != ((448, 448) if segmentation else (224, 224)):
        return []
    rows = config.dataset.kind if segmentation else config.task
    return [
        Figure(method, {name: values[column] for name, values in tables[rows].items()}, source)
        for source, tables in ((f"AnyUp, tab. {2 if segmentation else 3}", ANYUP), ("UPLiFT", UPLIFT))
        for column, method in enumerate(METHODS)
        if rows in tables
    ]
