"""An encoder and AnyUp in one ONNX file, which takes images alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from anyup_core.config import AnyUpConfig
from anyup_core.encoders import catalogue
from anyup_core.export import encoders, graph
from anyup_core.export.inputs import METADATA
from anyup_core.preprocessing import IMAGENET

FEATURES = ("features", "values")  # inputs of AnyUp that the encoder's output takes the place of


def build_combined(
    config: AnyUpConfig,
    tensors: Mapping[str, np.ndarray],
    encoder: str,
    stride: int | None,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    half: bool = False,
) -> Any:
    """Return an encoder and the upsampler of its features as one `onnx.ModelProto`.

    The image is normalised with the ImageNet mean and standard deviation; the encoder's own follow from it.

    Args:
        config, tensors, half: as for `graph.build`.
        encoder: name of an EfficientNet-Lite or of a vision transformer.
        stride: of the features, 16 or 32, or the patch size; None for the finest.
        weights: the encoder's; None for the published ones.

    Raises:
        ValueError: for another encoder or stride, and for a model whose guidance is no RGB image.
    """
    import onnx
    from onnx import helper, numpy_helper

    if config.input_dim != 3:
        raise ValueError(f"input_dim={config.input_dim}: an encoder and AnyUp share an image only if it is RGB.")
    first = encoders.build_encoder(encoder, weights, half=half, prefix="encoder_")
    strides = json.loads(first.metadata_props[0].value)["strides"]
    stride = strides[0] if stride is None else stride
    source = f"encoder_stride{stride}"
    if stride not in strides:
        raise ValueError(f"stride {stride}: the features of {encoder} have stride {' or '.join(map(str, strides))}.")

    upsampler = graph.build(config, tensors, half=half)
    published = catalogue.find(encoder)
    scale, shift = (np.array(x, np.float32)[:, None, None] for x in _between(published.mean, published.std))
    constants = [numpy_helper.from_array(x, name) for x, name in ((scale, "encoder_scale"), (shift, "encoder_shift"))]
    normalise = [
        helper.make_node("Mul", ["image", "encoder_scale"], ["encoder_scaled"]),
        helper.make_node("Add", ["encoder_scaled", "encoder_shift"], ["encoder_image"]),
    ]
    nodes = [*normalise, *first.graph.node, *upsampler.graph.node]
    for node in upsampler.graph.node:
        node.input[:] = [source if name in FEATURES else name for name in node.input]
    inputs = [info for info in upsampler.graph.input if info.name not in FEATURES]
    initializers = [*constants, *first.graph.initializer, *upsampler.graph.initializer]
    whole = helper.make_graph(nodes, "encoder_and_anyup", inputs, upsampler.graph.output, initializers)
    model = helper.make_model(whole, opset_imports=upsampler.opset_import, ir_version=upsampler.ir_version)
    model.producer_name = upsampler.producer_name
    (width,) = (info.type.tensor_type.shape.dim[1].dim_value for info in first.graph.output if info.name == source)
    settings = json.loads(upsampler.metadata_props[0].value) | dict(encoder=encoder, stride=stride, channels=width)
    helper.set_model_props(model, {METADATA: json.dumps(settings)})
    onnx.checker.check_model(model)
    return model


def _between(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return factor and summand that turn an image in ImageNet's normalisation into one in another."""
    ours, theirs = (np.array(pair) for pair in (IMAGENET, (mean, std)))
    return ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
