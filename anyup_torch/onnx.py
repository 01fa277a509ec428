"""AnyUp as an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from anyup_core.checks import OutputSize
from anyup_core.export.onnx_file import write_onnx
from anyup_torch import pretrained, upsamplers
from anyup_torch.model import AnyUp
from anyup_torch.upsamplers.jafar import JAFAR
from anyup_torch.upsamplers.naf import NAF


def export_onnx(
    model: Any,
    path: str | os.PathLike,
    *,
    image_size: OutputSize | None = None,
    features: Sequence[SupportsIndex] | None = None,
    output_size: OutputSize | None = None,
    dtype: str | None = None,
    encoder: str | None = None,
    stride: int | None = None,
    encoder_weights: str | os.PathLike | None = None,
) -> Path:
    """Write the model as an ONNX file, opset 18, and return its path.

    The file takes images, features and outputs of every size, in batches of any size; `anyup_core.onnx_inputs` makes
    what it needs, and is written beside it as `F_inputs.py`. With sizes it takes `image` and `features` of these alone.

    Args:
        model: AnyUp, or JAFAR or NAF of `upsamplers`, as it was made; a model with replaced submodules is refused.
        path: of the file, .onnx.
        image_size: height and width of the image of a closed file.
        features: height and width of its features, and their number of channels.
        output_size: height and width of its output (default: the image's).
        dtype: type of the stored weights: "float32", or "float16", which halves the file; it computes in float32.
        encoder: an EfficientNet-Lite or a vision transformer that the file holds too; it then takes images alone.
        stride: of that encoder's features, 16 or 32, or the patch size; None for the finest.
        encoder_weights: a file with its weights; None for the published ones.

    Raises:
        ImportError: if the package onnx is not installed.
        ValueError: for settings, sizes or paths that are impossible, and for a model with changed submodules.
        TypeError: for another upsampler, and for sizes that are no whole numbers.
        OSError: if the file cannot be written.
    """
    if not isinstance(model, AnyUp | JAFAR | NAF):
        name = type(model).__name__
        raise TypeError(
            f"{name} cannot be written as ONNX, AnyUp, JAFAR and NAF can; anyup_torch.export writes {name} as .pt2."
        )
    if model.changed:
        names = ", ".join(model.changed) if isinstance(model, AnyUp) else "submodules"
        raise ValueError(f"{names} differ from the model's own; an ONNX file holds the published model alone.")
    saved = pretrained.checkpoint(model) if isinstance(model, AnyUp) else upsamplers.checkpoint(model)
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
        encoder_weights=encoder_weights,
    )
