"""Published scores, which an evaluation of the same data and encoder prints beside its own.

No run of this project has reproduced them. Sources: AnyUp, arXiv 2510.12764v2, tables 2 and 3; UPLiFT, arXiv
2601.17950, whose authors ran the other methods themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from evaluation.config import Config, EncoderConfig

DINOV2_S = "vit_small_patch14_dinov2"
ANYUP, UPLIFT = "AnyUp, tab. {}", "UPLiFT"
SIZES = {"segmentation": (448, 448), "depth": (224, 224), "normals": (224, 224)}


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


SEGMENTATION = {  # method -> mIoU and accuracy on COCO-Stuff, VOC and ADE20k, percent; AnyUp's table 2
    "bilinear": (59.48, 79.32, 81.43, 95.38, 40.54, 74.12),
    "FeatUp": (61.95, 81.14, 83.37, 96.04, 42.19, 75.57),
    "LoftUp": (62.15, 81.32, 83.69, 96.11, 42.02, 75.72),
    "JAFAR": (61.82, 81.07, 84.36, 96.22, 42.06, 75.48),
    "AnyUp": (62.16, 81.37, 84.00, 96.19, 42.43, 75.85),
}
COLUMNS = {"cocostuff27": 0, "voc": 2, "ade20k": 4}
INDEPENDENT = {  # method -> mIoU on COCO-Stuff, VOC, ADE20k and Cityscapes, percent; UPLiFT's table
    "bilinear": (59.41, 81.62, 40.43, 59.71),
    "FeatUp": (61.77, 83.52, 42.07, 60.50),
    "LoftUp": (62.19, 84.63, 42.16, 62.09),
    "JAFAR": (61.71, 84.38, 41.96, 61.89),
    "AnyUp": (62.08, 84.33, 42.25, 61.33),
}
DATASETS = ("cocostuff27", "voc", "ade20k", "cityscapes")
NORMALS = {  # method -> RMSE in degrees and shares below 11.25, 22.5 and 30 degrees; AnyUp's table 3
    "bilinear": (32.70, 0.26, 0.53, 0.66),
    "FeatUp": (32.69, 0.25, 0.53, 0.66),
    "LoftUp": (33.94, 0.26, 0.51, 0.64),
    "JAFAR": (31.54, 0.28, 0.56, 0.68),
    "AnyUp": (31.17, 0.29, 0.57, 0.69),
}
DEPTH = {  # method -> RMSE in metres and delta 1, absolute and aligned; AnyUp's table 3
    "bilinear": (0.4925, 0.8081, 0.3582, 0.9112),
    "FeatUp": (0.4816, 0.8156, 0.3413, 0.9193),
    "LoftUp": (0.4847, 0.8127, 0.3478, 0.9166),
    "JAFAR": (0.4906, 0.8052, 0.3481, 0.9180),
    "AnyUp": (0.4755, 0.8216, 0.3378, 0.9233),
}


def figures(config: Config, encoder: EncoderConfig) -> list[Figure]:
    """Return what was published for the task, data and image size of an evaluation and one of its encoders."""
    same = encoder.name.partition(".")[0].removeprefix("timm:") == DINOV2_S and encoder.layer in ((-1,), (11,))
    same = same and encoder.norm == (config.task == "segmentation")  # Probe3D uses the features before the norm
    if not same or config.limit is not None or config.dataset.size != SIZES.get(config.task):
        return []
    return list(_rows(config.task, config.dataset.kind))


def _rows(task: str, kind: str) -> Iterator[Figure]:
    if task == "depth":
        for method, row in DEPTH.items():
            yield Figure(method, dict(zip(("rmse", "d1", "aligned_rmse", "aligned_d1"), row)), ANYUP.format(3))
    elif task == "normals":
        for method, row in NORMALS.items():
            yield Figure(method, dict(zip(("rmse", "11.25", "22.5", "30"), row)), ANYUP.format(3))
    else:
        for method, row in SEGMENTATION.items():
            if kind in COLUMNS:
                miou, accuracy = row[COLUMNS[kind] : COLUMNS[kind] + 2]
                yield Figure(method, dict(mIoU=miou / 100, accuracy=accuracy / 100), ANYUP.format(2))
        for method, row in INDEPENDENT.items():
            if kind in DATASETS:
                yield Figure(method, dict(mIoU=row[DATASETS.index(kind)] / 100), UPLIFT)
