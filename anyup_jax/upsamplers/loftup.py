"""LoftUp (arXiv 2504.14032) in Flax nnx: pixels, coded by place and colour, attend to the cells twice."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.geometry import axis_window
from anyup_core.upsamplers.loftup import (
    CELL_FREQUENCIES,
    HEADS,
    IMAGE_CODE,
    IMAGE_FREQUENCIES,
    LAYERS,
    LoftUpConfig,
    coordinates,
    frequencies,
)
from anyup_jax.attention import window_attention
from anyup_jax.layers import Conv, Linear
from anyup_jax.model import grid_of
from anyup_jax.row_shards import Size
from anyup_jax.upsamplers.interpolation import resize
from anyup_jax.upsamplers.protocol import ConfiguredUpsampler, image_by_image

POSITIONS = 4096  # pixels that go through the transformer at once
FINITE = 3e38  # clipping at it keeps XLA from fusing a product with the sum after it, which would round once less
MOMENTUM = 0.1  # of the running statistics


class FourierCode(nnx.Module):
    """Sines and cosines of places, and of colours, at frequencies up to 22026, with trained phases.

    The phases are float32 whatever the type of the computation: see `anyup_core.upsamplers.loftup.frequencies`.
    """

    def __init__(self, count: int, inputs: int):
        self.biases = nnx.Param(jnp.zeros((2, inputs, count), jnp.float32))

    def __call__(self, size: Size, colours: Float[Array, "B H W 3"] | None = None) -> Float[Array, "_ H W code"]:
        _, inputs, count = self.biases.shape
        waves = frequencies(count)
        rows, cols = (coordinates(side)[:, None] * waves for side in size)  # rounded on the host
        phases = [jnp.asarray(rows)[None, :, None], jnp.asarray(cols)[None, None]]
        if colours is not None:
            product = colours[..., None] * jnp.asarray(waves)
            product = jnp.clip(product, -FINITE, FINITE)
            phases += list(jnp.moveaxis(product, 3, 0))
        codes = []
        for wave, biases in zip((jnp.sin, jnp.cos), self.biases[...]):
            # the published table (inputs, count) is read as if it were (count, inputs)
            by_input = biases.reshape(count, inputs).T
            waved = [wave(phase + bias) for phase, bias in zip(phases, by_input)]
            shape = jnp.broadcast_shapes(*(x.shape for x in waved))
            code = jnp.stack([jnp.broadcast_to(x, shape) for x in waved], -1)
            codes.append(code.reshape(*shape[:3], count * inputs))
        return jnp.concatenate(codes + ([] if colours is None else [colours]), -1)


class BatchNorm(nnx.Module):
    """Normalisation over batch and positions by running statistics, or after `model.train()` by those of the batch."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(channels, jnp.float32))
        self.batches = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.use_running_average = True

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            wide = x.astype(jnp.float32)
            mean = wide.mean((0, 1, 2))
            var = jnp.square(wide - mean).mean((0, 1, 2))
            count = x.size // x.shape[3]
            kept, unbiased = 1 - MOMENTUM, var * (count / max(count - 1, 1))
            self.mean[...] = kept * self.mean[...] + MOMENTUM * lax.stop_gradient(mean)
            self.var[...] = kept * self.var[...] + MOMENTUM * lax.stop_gradient(unbiased)
            self.batches[...] = self.batches[...] + 1
        scale = self.scale[...] * lax.rsqrt(var + 1e-5)
        return (x * scale + (self.bias[...] - mean * scale)).astype(x.dtype)


class QueryEncoder(nnx.Module):
    """Two 3 x 3 convolutions of the pixels' codes."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        conv = functools.partial(Conv, padding="zeros", use_bias=True, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(IMAGE_CODE, rngs)
        self.conv1, self.batch_norm1 = conv(IMAGE_CODE, dim, 3), BatchNorm(dim)
        self.conv2, self.batch_norm2 = conv(dim, dim, 3), BatchNorm(dim)

    def __call__(self, code: Float[Array, "B H W code"]) -> Float[Array, "B H W D"]:
        x = jax.nn.relu(self.batch_norm1(self.conv1(self.norm(code))))
        return jax.nn.relu(self.batch_norm2(self.conv2(x)))


class Layer(nnx.Module):
    """Attention of the pixels to all cells, and a feed-forward network; both are added to the pixels."""

    def __init__(self, config: LoftUpConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dim, linear = config.dim, functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.norm_q, self.norm_kv, self.norm_ff = (layer_norm(dim, rngs) for _ in range(3))
        self.query, self.key, self.value, self.out = (linear(dim, dim) for _ in range(4))
        self.narrow, self.widen = linear(dim, config.channels), linear(config.channels, dim)

    def cells(self, cells: Float[Array, "B h w D"]) -> tuple[Float[Array, "B h w D"], Float[Array, "B h w D"]]:
        """Return keys and values."""
        cells = self.norm_kv(cells)
        return self.key(cells), self.value(cells)

    def __call__(
        self,
        x: Float[Array, "B Y X D"],
        cells: tuple[Float[Array, "B h w D"], Float[Array, "B h w D"]],
        q_chunk_size: int | None,
    ) -> Float[Array, "B Y X D"]:
        windows = [axis_window(n, m, 0) for n, m in zip(x.shape[1:3], cells[0].shape[1:3])]
        options: dict[str, Any] = dict(num_heads=HEADS, q_chunk_size=q_chunk_size, values_per_head=True)
        x = x + self.out(window_attention(self.query(self.norm_q(x)), *cells, *windows, **options))
        return x + self.widen(jax.nn.gelu(self.narrow(self.norm_ff(x)), approximate=False))


class LoftUp(ConfiguredUpsampler):
    """LoftUp, the published sine variant, in evaluation mode; `train()` lets the batch norms learn.

    Colours are scaled by their range over the whole batch, as in the published model, so that an image's output depends
    on its companions; with `per_image=True` it does not.

    Args:
        config: the settings; the default ones if None.
        rngs: random streams for the initial parameters.
        dtype: type of the computation but for the phases; parameters are float32 either way.
        fields: fields of `LoftUpConfig` that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings = LoftUpConfig

    def __init__(
        self, config: LoftUpConfig | None = None, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, **fields: Any
    ):
        super().__init__(config, dtype, **fields)
        settings = self.config
        self.norm = layer_norm(settings.channels, rngs)
        self.cell_code = FourierCode(CELL_FREQUENCIES, 2)
        self.image_code = FourierCode(IMAGE_FREQUENCIES, 5)
        self.queries = QueryEncoder(settings.dim, dtype=dtype, rngs=rngs)
        for layer in range(1, LAYERS + 1):
            setattr(self, f"layer{layer}", Layer(settings, dtype=dtype, rngs=rngs))
        self.final_norm = layer_norm(settings.dim, rngs)
        self.final_conv = Conv(settings.dim, settings.channels, use_bias=True, dtype=dtype, rngs=rngs)
        self.output_norm = layer_norm(settings.channels, rngs, 1e-6)

    def upsample(
        self, image: Float[Array, "B H W 3"], features: Float[Array, "B h w C"], size: Size, q_chunk_size: int | None
    ) -> Float[Array, "B Ho Wo C"]:
        image = resize(image.astype(jnp.float32), size, "bilinear")
        colours = scale_colours(image, self.config.per_image)  # of the batch together
        return image_by_image(lambda x, y: self._upsample(x, y, size, q_chunk_size), colours, features)

    def _upsample(
        self, colours: Float[Array, "B H W 3"], features: Float[Array, "B h w C"], size: Size, q_chunk_size: int | None
    ) -> Float[Array, "B H W C"]:
        normed, grid = self.norm(features.astype(self.dtype)), grid_of(features)
        code = jnp.broadcast_to(self.cell_code(grid), (*normed.shape[:3], 4 * CELL_FREQUENCIES))
        cells = jnp.concatenate([normed, code.astype(self.dtype)], -1)
        layers = [getattr(self, f"layer{layer}") for layer in range(1, LAYERS + 1)]
        cells = [layer.cells(cells) for layer in layers]
        queries = self.queries(self.image_code(size, colours).astype(self.dtype))

        def transform(x):
            for layer, seen in zip(layers, cells):
                x = layer(x, seen, q_chunk_size)
            return self.output_norm(self.final_conv(self.final_norm(x)))

        return map_strips(transform, queries, q_chunk_size or POSITIONS)


def map_strips(function, x: Float[Array, "B H W D"], positions: int) -> Float[Array, "B H W C"]:
    """Apply a function of single pixels to strips of rows, of that many positions or one row; none of it is kept."""
    batch, height, width, dim = x.shape
    rows = min(height, max(1, positions // width))
    count = -(-height // rows)
    rows = -(-height // count)
    padded = jnp.pad(x, ((0, 0), (0, count * rows - height), (0, 0), (0, 0)))

    @jax.checkpoint
    def strip(index):
        return function(lax.dynamic_slice(padded, (0, index * rows, 0, 0), (batch, rows, width, dim)))

    strips = lax.map(strip, jnp.arange(count, dtype=jnp.int32))
    return jnp.moveaxis(strips, 0, 1).reshape(batch, count * rows, width, -1)[:, :height]


def scale_colours(image: Float[Array, "B H W 3"], per_image: bool) -> Float[Array, "B H W 3"]:
    """Return colours from -0.5 to 0.5, by the range of each channel over the batch, or over each image."""
    axes = (1, 2) if per_image else (0, 1, 2)
    least, most = image.min(axes, keepdims=True), image.max(axes, keepdims=True)
    # XLA would turn a division by what it sees is broadcast into a product with the inverse, which rounds differently
    extent = jnp.broadcast_to(jnp.maximum(most - least, 1e-4), image.shape)
    shifted, extent = lax.optimization_barrier((image - least, extent))
    return lax.optimization_barrier(shifted / extent) - 0.5


def layer_norm(channels: int, rngs: nnx.Rngs, epsilon: float = 1e-5) -> nnx.LayerNorm:
    return nnx.LayerNorm(channels, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
