"""Labelled images in, arrays of one size out: segmentation in several layouts, depth and normals of NYUv2."""

from evaluation.data.nyu import Scene, Scenes, open_nyu
from evaluation.data.segmentation import Examples, open_segmentation

__all__ = ["Examples", "Scene", "Scenes", "open_nyu", "open_segmentation"]
