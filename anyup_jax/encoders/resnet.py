"""ResNet with bottleneck blocks, the stride on their 3 x 3 convolution.

"Deep Residual Learning for Image Recognition" (He et al., 2015, arXiv 1512.03385); as timm computes it.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.nn import relu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.encoders.resnet import ResNet as Config
from anyup_jax.encoders.layers import BatchNorm, Conv, run, stack

EPSILON = 1e-5  # of every norm
EXPANSION = 4  # channels a block gives, in units of those of its 3 x 3 convolution


class ResNet(nnx.Module):
    """The backbone of `anyup_core.encoders.resnet.ResNet`, without its classifier."""

    def __init__(self, config: Config, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        self.config = config
        self.remat = remat
        self.stem = ConvNorm(3, config.stem_width, 7, stride=2, dtype=dtype, rngs=rngs)
        width, stages = config.stem_width, []
        for i, depth in enumerate(config.depths):
            stages.append(Stage(width, config.stem_width << i, depth, 1 if i == 0 else 2, dtype=dtype, rngs=rngs))
            width = EXPANSION * config.stem_width << i
        self.stages = nnx.List(stages)

    def intermediates(
        self, image: Float[Array, "B H W 3"], layers: tuple[int, ...], norm: bool
    ) -> list[tuple[Float[Array, "B h w C"], None]]:
        """Return the maps of these layers, the stem (0) or a stage, in rising order; `norm` changes nothing."""
        x = relu(self.stem(image))
        found = [(x, None)] if 0 in layers else []
        if layers[-1] > 0:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for i, stage in enumerate(self.stages[: layers[-1]]):
            x = stage(x, remat=self.remat)
            if i + 1 in layers:
                found.append((x, None))
        return found


class Stage(nnx.Module):
    """Blocks of one width; the first has the stride and a convolution as its shortcut, the others are stacked."""

    def __init__(self, inputs: int, width: int, depth: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        outputs = EXPANSION * width
        self.first = Block(inputs, width, stride=stride, dtype=dtype, rngs=rngs)
        self.shortcut = ConvNorm(inputs, outputs, 1, stride=stride, dtype=dtype, rngs=rngs)
        self.others = stack(lambda rngs: Block(outputs, width, dtype=dtype, rngs=rngs), depth - 1, rngs)
        self.depth = depth

    def __call__(self, x: Float[Array, "B H W C"], *, remat: bool) -> Float[Array, "B h w D"]:
        first = jax.checkpoint(self.first) if remat else self.first
        return run(self.others, first(x, self.shortcut(x)), 0, self.depth - 1, remat=remat)


class Block(nnx.Module):
    """Narrow, filter, widen; added to the input, or to the shortcut where one is given."""

    def __init__(self, inputs: int, width: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs):
        self.narrow = ConvNorm(inputs, width, 1, dtype=dtype, rngs=rngs)
        self.filter = ConvNorm(width, width, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.widen = ConvNorm(width, EXPANSION * width, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], shortcut: Float[Array, "B h w D"] | None = None
    ) -> Float[Array, "B h w D"]:
        hidden = relu(self.filter(relu(self.narrow(x))))
        return relu(self.widen(hidden) + (x if shortcut is None else shortcut))


class ConvNorm(nnx.Module):
    """Convolution, zeros around the image, and batch norm."""

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, *, stride: int = 1, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        edges = (kernel_size // 2, kernel_size // 2)
        options = dict(stride=stride, padding=(edges, edges), bias=False, dtype=dtype, rngs=rngs)
        self.conv = Conv(inputs, outputs, kernel_size, **options)
        self.norm = BatchNorm(outputs, epsilon=EPSILON)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return self.norm(self.conv(x))
