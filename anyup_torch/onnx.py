"""AnyUp as an ONNX file."""

from __future__ import annotations

import os
from pathlib import Path

from anyup_core.export.onnx_file import write_onnx
from anyup_torch.model import AnyUp
from anyup_torch.pretrained import checkpoint


def export_onnx(
    model: AnyUp,
    path: str | os.PathLike,
    *,
    image_size: tuple[int, int] | None = None,
    features: tuple[int, int, int] | None = None,
    output_size: tuple[int, int] | None = None,
    dtype: str | None = None,
    encoder: str | None = None,
    stride: int = 16,
) -> Path:
    """Write the model as an ONNX file, opset 18, and return its path.

    The file takes images, features and outputs of every size, in batches of any size; `anyup_core.onnx_inputs` makes
    what it needs, and is written beside it as `F_inputs.py`. With sizes it takes `image` and `features` of these alone.

    Args:
        model: whose parameters and settings are written; submodules that were replaced are not.
        path: of the file, .onnx.
        image_size: height and width of the image of a closed file.
        features: height and width of its features, and their number of channels.
        output_size: height and width of its output (default: the image's).
        dtype: type of the stored weights: "float32", or "float16", which halves the file; it computes in float32.
        encoder: an EfficientNet-Lite that the file holds too; it then takes images alone.
        stride: of that encoder's features, 16 or 32.

    Raises:
        ImportError: if the package onnx is not installed.
        ValueError: for settings, sizes or paths that are impossible, and for a model with changed submodules.
        OSError: if the file cannot be written.
    """
    if changed := model.changed:
        raise ValueError(f"{', '.join(changed)} differ from AnyUp's own; an ONNX file holds the published model alone.")
    saved = checkpoint(model)
    return write_onnx(
        model.config,
        saved.tensors,
        path,
        image_size=image_size,
        features=features,
        output_size=output_size,
        dtype=dtype,
        encoder=encoder,
        stride=stride,
    )
