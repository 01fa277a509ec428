"""EfficientNet-Lite: inverted residual blocks without squeeze-and-excitation, ReLU6, TensorFlow's "SAME" padding.

"EfficientNet" (Tan and Le, 2019, arXiv 1905.11946); as timm computes its `tf_efficientnet_lite` models.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
from flax import nnx
from jax.nn import relu6
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.encoders.efficientnet import EfficientNet as Config
from anyup_core.encoders.efficientnet import Stage
from anyup_jax.encoders.layers import BatchNorm, ConvBackbone, ConvNorm, DepthwiseConv, Linear

EPSILON = 1e-3  # of every norm
CLASSES = 1000  # of ImageNet
convolution = functools.partial(ConvNorm, padding="SAME", epsilon=EPSILON)


class EfficientNet(ConvBackbone):
    """The backbone of `anyup_core.encoders.efficientnet.EfficientNet`, and its classifier."""

    def __init__(self, config: Config, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        self.config = config
        self.remat = remat
        self.stem = convolution(3, config.stem_width, 3, stride=2, dtype=dtype, rngs=rngs)
        width, stages = config.stem_width, []
        for stage in config.stages:
            stages.append(nnx.List())
            for i in range(stage.blocks):
                block = Block(width, stage, stage.stride if i == 0 else 1, dtype=dtype, rngs=rngs)
                stages[-1].append(block)
                width = stage.width
        self.stages = nnx.List(stages)
        self.head = convolution(width, config.head_width, 1, dtype=dtype, rngs=rngs)
        self.classifier = Linear(config.head_width, CLASSES, dtype=dtype, rngs=rngs)

    def outputs(self, image: Float[Array, "B H W 3"]) -> Iterator[Float[Array, "B h w C"]]:
        """Yield the map of the last stage of each stride."""
        x = relu6(self.stem(image))
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = jax.checkpoint(block)(x) if self.remat else block(x)
            if i in self.config.taps:
                yield x

    def logits(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B classes"]:
        """Return the logit of every class of ImageNet for a normalised image."""
        *_, x = self.outputs(image)
        return self.classifier(relu6(self.head(x)).mean((1, 2)))


class Block(nnx.Module):
    """Widen, filter each channel, narrow; the result is added to the input where the shapes agree."""

    def __init__(self, width: int, stage: Stage, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, size = stage.expansion * width, stage.kernel_size
        self.expand = convolution(width, hidden, 1, dtype=dtype, rngs=rngs) if stage.expansion > 1 else None
        self.depthwise = DepthwiseConv(hidden, size, stride=stride, dtype=dtype, rngs=rngs)
        self.depthwise_norm = BatchNorm(hidden, epsilon=EPSILON, rngs=rngs)
        self.project = convolution(hidden, stage.width, 1, dtype=dtype, rngs=rngs)
        self.residual = stride == 1 and width == stage.width

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        hidden = x if self.expand is None else relu6(self.expand(x))
        hidden = relu6(self.depthwise_norm(self.depthwise(hidden)))
        narrow = self.project(hidden)
        return x + narrow if self.residual else narrow
