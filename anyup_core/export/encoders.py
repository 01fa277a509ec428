"""EfficientNet-Lite as an ONNX graph that gives the maps with strides 16 and 32, for images of any size.

Batch norms are folded into the convolutions before them. As our encoders do, an image is padded to a multiple of the
stride and the cells on the padding are cropped; sides are then even at every convolution that halves them, so that
TensorFlow's "SAME" padding is a constant. Where the two strides pad to different sizes, the graph's only branch
computes the map with stride 16 from its own padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from anyup_core.checkpoints import encoder_files
from anyup_core.encoders import catalogue
from anyup_core.encoders.efficientnet import EfficientNet, Stage
from anyup_core.encoders.vit import ViT
from anyup_core.export.builder import Graph
from anyup_core.export.cropping import crop, pad, padded
from anyup_core.export.vit import ViTWriter

METADATA = "anyup_encoder"  # the entry of a file's metadata that holds name, normalisation and outputs, as JSON
EPSILON = 1e-3  # of every norm
STRIDES = (16, 32)


def build_encoder(
    name: str, tensors: Mapping[str, np.ndarray] | None = None, *, half: bool = False, prefix: str = ""
) -> Any:
    """Return an EfficientNet-Lite or a vision transformer as an `onnx.ModelProto`.

    Its input is `image` (B, 3, H, W), normalised with the mean and the standard deviation in its metadata; its outputs
    are `stride16` (B, C, H // 16, W // 16) and `stride32` (B, D, H // 32, W // 32), or, with patches of P pixels,
    `strideP` alone.

    Args:
        name: of the catalogue, such as `efficientnet_lite0`.
        tensors: its parameters under timm's names; by default the published ones, which may be fetched.
        half: store the weights as float16; the graph computes in float32.
        prefix: of every name.

    Raises:
        ValueError: if the encoder is of another family.
        ImportError: if the package that holds the weights is not installed.
    """
    published, config = catalogue.find(name), config_of(name)
    tensors = encoder_files.load(name).tensors if tensors is None else tensors
    strides = STRIDES if isinstance(config, EfficientNet) else (config.patch_size,)
    metadata = {METADATA: json.dumps(dict(name=name, mean=published.mean, std=published.std, strides=strides))}
    if isinstance(config, EfficientNet):
        return Writer(config, tensors, half, prefix).model(metadata)
    return ViTWriter(config, tensors, half, prefix).model(metadata)


def config_of(name: str) -> EfficientNet | ViT:
    """Return the sizes of an encoder. Raises ValueError for one that is not written as an ONNX file."""
    config = catalogue.find(name).config
    if isinstance(config, EfficientNet) or (isinstance(config, ViT) and type(config) is ViT):
        return config
    raise ValueError(
        f"{name} is neither an EfficientNet-Lite nor a vision transformer with learned position embeddings; only "
        "these encoders are written as ONNX files."
    )


class Writer:
    """Writes the graph; the methods return names of tensors."""

    def __init__(self, config: EfficientNet, tensors: Mapping[str, np.ndarray], half: bool, prefix: str = ""):
        self.config, self.tensors = config, tensors
        self.g = Graph(half, loops=False, prefix=prefix)

    def model(self, metadata: Mapping[str, str]) -> Any:
        from onnx import TensorProto

        g, (fine, coarse) = self.g, STRIDES
        image = g.input(f"{g.prefix}image", np.float32, ("B", 3, "H", "W"))
        size = g.op("Slice", g.op("Shape", image), g.ints(2), g.ints(4))
        apart = g.op("Sub", padded(g, size, coarse), padded(g, size, fine))
        split = self.config.taps[STRIDES.index(fine) - len(STRIDES)] + 1

        shared = self.stages(g, self.stem(g, pad(g, image, size, coarse)), 0, split)
        deep = self.stages(g, shared, split, len(self.config.stages))

        def again(g: Graph) -> str:
            return self.stages(g, self.stem(g, pad(g, image, size, fine)), 0, split)

        differ = g.op("Cast", g.op("ReduceMax", apart, keepdims=0), to=TensorProto.BOOL)
        shallow = g.choose(differ, again, lambda g: g.op("Identity", shared))
        outputs = {
            f"{g.prefix}stride{stride}": (
                crop(g, x, size, stride),
                ("B", width, f"H // {stride}", f"W // {stride}"),
            )
            for x, stride, width in zip((shallow, deep), STRIDES, self.config.widths[-len(STRIDES) :])
        }
        return g.finish("encoder", outputs, metadata)

    def stem(self, g: Graph, image: str) -> str:
        return self.relu6(g, self.conv_norm(g, image, "conv_stem", "bn1", stride=2))

    def stages(self, g: Graph, x: str, first: int, stop: int) -> str:
        widths = (self.config.stem_width, *(stage.width for stage in self.config.stages))
        for i in range(first, stop):
            stage = self.config.stages[i]
            for j in range(stage.blocks):
                keeps = (j > 0 or stage.stride == 1) and (widths[i] if j == 0 else stage.width) == stage.width
                y = self.block(g, x, f"blocks.{i}.{j}", stage, stage.stride if j == 0 else 1)
                x = g.op("Add", x, y) if keeps else y
        return x

    def block(self, g: Graph, x: str, name: str, stage: Stage, stride: int) -> str:
        """Widen, filter each channel, narrow."""
        if stage.expansion == 1:
            x = self.relu6(g, self.conv_norm(g, x, f"{name}.conv_dw", f"{name}.bn1", stride))
            return self.conv_norm(g, x, f"{name}.conv_pw", f"{name}.bn2")
        x = self.relu6(g, self.conv_norm(g, x, f"{name}.conv_pw", f"{name}.bn1"))
        x = self.relu6(g, self.conv_norm(g, x, f"{name}.conv_dw", f"{name}.bn2", stride))
        return self.conv_norm(g, x, f"{name}.conv_pwl", f"{name}.bn3")

    def relu6(self, g: Graph, x: str) -> str:
        return g.op("Clip", x, *(g.constant(np.array(bound, np.float32)) for bound in (0, 6)))

    def conv_norm(self, g: Graph, x: str, conv: str, norm: str, stride: int = 1) -> str:
        """Return the convolution, depthwise where a filter has one channel, with the batch norm folded into it."""
        gamma, beta, mean, variance = (
            self.tensors[f"{norm}.{key}"].astype(np.float64)
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        weight = self.tensors[f"{conv}.weight"] * scale[:, None, None, None]
        bias = (beta - mean * scale).astype(np.float32)
        groups, side = (len(weight) if weight.shape[1] == 1 else 1), weight.shape[2]
        before = (side - stride) // 2  # of an even side; the rest comes after
        pads = [before, before, side - stride - before, side - stride - before]
        return g.conv(x, weight, bias, stride=stride, pads=pads, group=groups)
