"""ResNet with bottleneck blocks, the stride on their 3 x 3 convolution.

"Deep Residual Learning for Image Recognition" (He et al., 2015, arXiv 1512.03385); as timm computes it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
from flax import nnx
from jax.nn import relu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.encoders.resnet import ResNet as Config
from anyup_jax.encoders.layers import ConvBackbone, ConvNorm, run, stack

EXPANSION = 4  # a block's output channels, in units of those of its 3 x 3 convolution
convolution = functools.partial(ConvNorm, epsilon=1e-5)


class ResNet(ConvBackbone):
    """The backbone of `anyup_core.encoders.resnet.ResNet`, without its classifier."""

    def __init__(self, config: Config, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        self.config = config
        self.remat = remat
        self.stem = convolution(3, config.stem_width, 7, stride=2, dtype=dtype, rngs=rngs)
        width, stages = config.stem_width, []
        for i, depth in enumerate(config.depths):
            stages.append(Stage(width, config.stem_width << i, depth, 1 if i == 0 else 2, dtype=dtype, rngs=rngs))
            width = EXPANSION * config.stem_width << i
        self.stages = nnx.List(stages)

    def outputs(self, image: Float[Array, "B H W 3"]) -> Iterator[Float[Array, "B h w C"]]:
        """Yield the maps of the stem and of each stage."""
        x = relu(self.stem(image))
        yield x
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in self.stages:
            x = stage(x, remat=self.remat)
            yield x


class Stage(nnx.Module):
    """Blocks of one width: the first has the stride and a convolution as its shortcut, the others are stacked."""

    def __init__(self, inputs: int, width: int, depth: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        outputs = EXPANSION * width
        self.first = Block(inputs, width, stride=stride, dtype=dtype, rngs=rngs)
        self.shortcut = convolution(inputs, outputs, 1, stride=stride, dtype=dtype, rngs=rngs)
        self.others = stack(lambda rngs: Block(outputs, width, dtype=dtype, rngs=rngs), depth - 1, rngs)
        self.depth = depth

    def __call__(self, x: Float[Array, "B H W C"], *, remat: bool) -> Float[Array, "B h w D"]:
        first = jax.checkpoint(self.first) if remat else self.first
        return run(self.others, first(x, self.shortcut(x)), 0, self.depth - 1, remat=remat)


class Block(nnx.Module):
    """Narrow, filter, widen; the result is added to the input, or to the shortcut if there is one."""

    def __init__(self, inputs: int, width: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs):
        self.narrow = convolution(inputs, width, 1, dtype=dtype, rngs=rngs)
        self.filter = convolution(width, width, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.widen = convolution(width, EXPANSION * width, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], shortcut: Float[Array, "B h w D"] | None = None
    ) -> Float[Array, "B h w D"]:
        hidden = relu(self.filter(relu(self.narrow(x))))
        return relu(self.widen(hidden) + (x if shortcut is None else shortcut))
