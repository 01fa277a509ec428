"""Writes ONNX files: one for every size, or a closed one for fixed sizes; and, beside the former, what feeds it."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from anyup_core import geometry
from anyup_core.checkpoints import encoder_files
from anyup_core.checks import OutputSize
from anyup_core.config import AnyUpConfig
from anyup_core.export import graph, inputs
from anyup_core.export.combined import build_combined
from anyup_core.export.encoders import build_encoder, config_of
from anyup_core.export.jafar import build_jafar
from anyup_core.export.naf import build_naf
from anyup_core.export.program import Shapes, check_shapes
from anyup_core.files import check_output
from anyup_core.replacement import replacing
from anyup_core.upsamplers import naf
from anyup_core.upsamplers.config import UpsamplerConfig
from anyup_core.upsamplers.jafar import JAFARConfig
from anyup_core.upsamplers.naf import NAFConfig

BUILDERS: dict[type, Any] = {JAFARConfig: build_jafar, NAFConfig: build_naf}  # of upsamplers other than AnyUp
DTYPES = ("float32", "float16")  # of the stored weights; the graph computes in float32
GEOMETRY = (
    geometry.AxisWindow,
    geometry.paper_bounds,
    geometry.Neighbourhood,
    geometry.neighbourhood,
    geometry._dilated,
    geometry._windowed,
    geometry.axis_window.__wrapped__,
    geometry.kernel_window.__wrapped__,
    geometry.AxisTiles,
    geometry.tile_axis,
    geometry.plan_tiles.__wrapped__,
    geometry._sizes,
    geometry.coordinates,
    geometry.pool_bins.__wrapped__,
    geometry.reflection,
    geometry.taps_in_bounds,
    naf.centres,
    naf.reduced,
)
"""What `inputs.py` uses, and what this uses."""


def write_onnx(
    config: AnyUpConfig | UpsamplerConfig,
    tensors: Mapping[str, np.ndarray],
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
    """Write a model as an ONNX file, opset 18.

    Without sizes the file takes images, features and outputs of every size, in batches of any size, with the tables
    that `onnx_inputs` makes; that function is written beside it, as `F_inputs.py`, which needs numpy alone. With sizes
    the file takes `image` (1, input_dim, H, W) and `features` (1, C, h, w) alone, and has neither loops nor branches.

    Args:
        config: the model's: of AnyUp, JAFAR or NAF.
        tensors: its parameters under their published names.
        path: of the file, .onnx.
        image_size: height and width of the image.
        features: height and width of the features, and their number of channels.
        output_size: height and width of the output (default: the image's).
        dtype: type of the stored weights: float32, or float16, which halves the file; the graph computes in float32.
        encoder: an EfficientNet-Lite or a vision transformer that the file holds too: it then takes images of every
            size, without features.
        stride: of that encoder's features, 16 or 32, or the patch size; None for the finest.
        encoder_weights: a file with its weights; None for the published ones.

    Raises:
        ImportError: if the package onnx is not installed.
        ValueError, TypeError: for another suffix, one size without the other, sizes that are impossible, another dtype,
            or an encoder or stride that cannot be exported, or not with sizes.
        OSError: if the file cannot be written.
    """
    sizes = check_closed(config, image_size, features, output_size)
    path, half = check_file(path, dtype)
    if isinstance(config, UpsamplerConfig):
        if encoder is not None:
            raise ValueError(f"encoder={encoder!r}: only AnyUp is written in one file with an encoder.")
        model = BUILDERS[type(config)](config, tensors, half=half, sizes=sizes)
    elif encoder is None:
        model = graph.build(config, tensors, half=half, sizes=sizes)
    else:
        if sizes is not None:
            raise ValueError(
                f"encoder={encoder!r}: a file that holds an encoder takes every size; leave the sizes out."
            )
        config_of(encoder)
        weights = encoder_files.load(encoder, encoder_weights).tensors
        model = build_combined(config, tensors, encoder, stride, weights=weights, half=half)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    if sizes is None:
        with replacing(inputs_path(path)) as temporary:
            temporary.write_text(standalone_inputs())
    return path


def write_encoder(
    name: str,
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    encoder_weights: str | os.PathLike | None = None,
) -> Path:
    """Write an EfficientNet-Lite or a vision transformer as an ONNX file for images of every size.

    Its input is `image` (B, 3, H, W), normalised as its metadata says, its outputs `stride16` and `stride32`, or, with
    patches of P pixels, `strideP`. Arguments are as for `write_onnx`.

    Raises:
        ImportError, ValueError, OSError: as `write_onnx`, and ImportError if the encoder's weights are not installed.
    """
    path, half = check_file(path, dtype)
    config_of(name)
    tensors = encoder_files.load(name, encoder_weights).tensors
    data = build_encoder(name, tensors, half=half).SerializeToString()
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def check_file(path: str | os.PathLike, dtype: str | None) -> tuple[Path, bool]:
    """Return the path of an ONNX file to write, and whether its weights are float16.

    Raises:
        ImportError: if the package onnx is not installed.
        ValueError, OSError: for another dtype, and as `files.check_output`.
    """
    path = check_output(path, (".onnx",))
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r}: weights are stored as one of {', '.join(DTYPES)}.")
    if importlib.util.find_spec("onnx") is None:
        raise ImportError('Writing ONNX files needs onnx: pip install "anyup-jax[onnx]".')
    return path, dtype == "float16"


def inputs_path(path: Path) -> Path:
    """Return the path of the tables' function beside a file."""
    return path.with_name(f"{path.stem}_inputs.py")


def check_closed(
    config: AnyUpConfig | UpsamplerConfig,
    image_size: OutputSize | None,
    features: Sequence[SupportsIndex] | None,
    output_size: OutputSize | None,
) -> Shapes | None:
    """Return the sizes of a closed file; None if there are none.

    Raises:
        ValueError, TypeError: for one size without the other, and for sizes that do not fit the model.
    """
    if image_size is None and features is None and output_size is None:
        return None
    if image_size is None or features is None or len(features) != 3:
        raise ValueError(
            "a file of fixed sizes needs image_size=(H, W) and features=(h, w, C); without either it takes every size."
        )
    width, multiple = (config.width, config.multiple) if isinstance(config, UpsamplerConfig) else (None, 1)
    shapes = check_shapes(width, multiple, image_size, features, output_size, 1)
    if isinstance(config, UpsamplerConfig):
        config.check(shapes.image, shapes.cells, shapes.output or shapes.image)
    return dataclasses.replace(shapes, channels=int(features[2]))


def standalone_inputs() -> str:
    """Return `onnx_inputs` and all it needs as the text of one module, which imports numpy alone."""
    constants = ("TILE_OVERHEAD", "MAX_TILE", "MAX_PAIRS")
    own = (
        inputs.onnx_inputs,
        inputs.check_image,
        inputs.check_maps,
        inputs.onnx_tables,
        inputs.image_tables,
        inputs.attention_tables,
        inputs.naf_tables,
        inputs.row_blocks,
        inputs.lengthened,
        inputs.pooling,
        inputs.onnx_settings,
        inputs.read_metadata,
        inputs._entry,
        inputs._varint,
    )
    sources = [inspect.getsource(part) for part in (*own, *GEOMETRY)]
    sources = ["\n".join(line for line in text.splitlines() if "lru_cache" not in line) for text in sources]
    values = [f"{name} = {getattr(geometry, name)}" for name in constants]
    values += [f"REDUCTION = {naf.REDUCTION}"]
    values += [f"{name} = {getattr(inputs, name)!r}" for name in ("METADATA", "BLOCK", "RESPONSES", "PAIRS", "NEVER")]
    head = (
        '"""The inputs of an ONNX file of AnyUp: `session.run(None, onnx_inputs("F.onnx", image, features))`.\n\n'
        'Written by `anyup export`; it needs numpy alone. Licence: Apache-2.0.\n"""\n\n'
        "from __future__ import annotations\n\nimport dataclasses\nimport io\nimport json\nimport os\n"
        "from collections.abc import Mapping\n\nimport numpy as np\n"
    )
    return "\n\n".join((head + "\n" + "\n".join(values), *sources)).rstrip() + "\n"
