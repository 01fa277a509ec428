"""ConvNeXt: a depthwise 7 x 7 convolution and an MLP per block.

"A ConvNet for the 2020s" (Liu et al., 2022, arXiv 2201.03545); as timm computes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.encoders.convnext import ConvNeXt as Config
from anyup_jax.encoders.layers import Conv, ConvBackbone, DepthwiseConv, LayerNorm, Linear, gelu, run, stack

EPSILON = 1e-6  # of every norm
KERNEL = 7  # side of the depthwise filters


class ConvNeXt(ConvBackbone):
    """The backbone of `anyup_core.encoders.convnext.ConvNeXt`, without its head."""

    def __init__(self, config: Config, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        self.config = config
        self.remat = remat
        width = config.widths[0]
        self.stem = Conv(3, width, 4, stride=4, dtype=dtype, rngs=rngs)
        self.stem_norm = LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        sizes = zip((None, *config.widths), config.widths, config.depths)
        self.stages = nnx.List([Stage(*size, dtype=dtype, rngs=rngs) for size in sizes])

    def outputs(self, image: Float[Array, "B H W 3"]) -> Iterator[Float[Array, "B h w C"]]:
        """Yield the map of each stage."""
        x = self.stem_norm(self.stem(image))
        for stage in self.stages:
            x = stage(x, remat=self.remat)
            yield x


class Stage(nnx.Module):
    """Stacked blocks of one width; all stages but the first begin with a norm and a strided convolution."""

    def __init__(self, inputs: int | None, width: int, depth: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = None if inputs is None else LayerNorm(inputs, epsilon=EPSILON, rngs=rngs)
        self.reduce = None if inputs is None else Conv(inputs, width, 2, stride=2, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(width, dtype=dtype, rngs=rngs), depth, rngs)
        self.depth = depth

    def __call__(self, x: Float[Array, "B H W C"], *, remat: bool) -> Float[Array, "B h w D"]:
        if self.reduce is not None:
            x = self.reduce(self.norm(x))
        return run(self.blocks, x, 0, self.depth, remat=remat)


class Block(nnx.Module):
    """Filter each channel, normalise, an MLP over the channels, scaled per channel and added."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.depthwise = DepthwiseConv(width, KERNEL, use_bias=True, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.widen = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.narrow = Linear(4 * width, width, dtype=dtype, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.full(width, 1e-6, jnp.float32))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        hidden = gelu(self.widen(self.norm(self.depthwise(x))))
        return x + self.narrow(hidden) * self.layer_scale[...].astype(x.dtype)
