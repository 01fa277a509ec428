"""Layers that several families of encoders share, NHWC. Parameters are float32; `dtype` is the type of the computation.

Norm statistics are float32 in every type. Matrix products take the precision of the context: `Encoder` asks for exact
float32 where it computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Padding = str | tuple[tuple[int, int], tuple[int, int]]


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float = 0.02) -> Float[Array, ...]:
    return deviation * jax.random.normal(rngs.params(), shape, jnp.float32)


class Linear(nnx.Module):
    """`x @ kernel + bias`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(rngs, (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        x = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the channels, then a scale and a shift."""

    def __init__(self, channels: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class BatchNorm(nnx.Module):
    """Normalisation with the statistics of the training, one scale and one shift per channel."""

    def __init__(self, channels: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        scale = self.scale[...] * lax.rsqrt(self.var[...] + self.epsilon)
        return (x * scale + (self.bias[...] - self.mean[...] * scale)).astype(x.dtype)


class Conv(nnx.Module):
    """k x k convolution; kernel (k, k, in, out); `padding` as in `jax.lax.conv_general_dilated`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: Padding = "VALID",
        bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(normal(rngs, (kernel_size, kernel_size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, x: Float[Array, "B H W inputs"]) -> Float[Array, "B h w outputs"]:
        kernel, strides = self.kernel[...].astype(self.dtype), (self.stride, self.stride)
        x = x.astype(self.dtype)
        if kernel.shape[:2] == (1, 1):  # a matrix product, which is faster than a convolution on a CPU
            x = jnp.matmul(x[:, :: self.stride, :: self.stride], kernel[0, 0])
            return x if self.bias is None else x + self.bias[...].astype(self.dtype)
        x = lax.conv_general_dilated(x, kernel, strides, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class DepthwiseConv(nnx.Module):
    """One k x k filter per channel, "SAME" padding as TensorFlow has it; kernel (k, k, 1, channels).

    A sum of shifted images, which XLA fuses into one loop: on a CPU several times as fast as its grouped convolution.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(normal(rngs, (kernel_size, kernel_size, 1, channels)))
        self.bias = nnx.Param(jnp.zeros(channels)) if bias else None
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        kernel = self.kernel[...].astype(self.dtype).astype(jnp.float32)
        size, stride = kernel.shape[0], self.stride
        edges = lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
        height, width = (-(-side // stride) for side in x.shape[1:3])
        x = jnp.pad(x.astype(self.dtype), ((0, 0), *edges, (0, 0)))
        total = jnp.float32(0) if self.bias is None else self.bias[...]
        for row in range(size):
            for column in range(size):
                rows = slice(row, row + stride * (height - 1) + 1, stride)
                columns = slice(column, column + stride * (width - 1) + 1, stride)
                total += x[:, rows, columns] * kernel[row, column]
        return total.astype(self.dtype)


def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """x Phi(x) with the normal distribution's Phi(x) = (1 + erf(x / sqrt(2))) / 2, rounded as PyTorch rounds it."""
    wide = x.astype(jnp.float32)
    return (wide * 0.5 * (1 + lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def attend(
    query: Float[Array, "B T N K"], key: Float[Array, "B S N K"], value: Float[Array, "B S N K"]
) -> Float[Array, "B T N K"]:
    """Return softmax(q k^T / sqrt(K)) v per head; the softmax is float32."""
    return lax.platform_dependent(query, key, value, cpu=attend_on_cpu, default=jax.nn.dot_product_attention)


def attend_on_cpu(
    query: Float[Array, "B T N K"], key: Float[Array, "B S N K"], value: Float[Array, "B S N K"]
) -> Float[Array, "B T N K"]:
    """Do the same as `jax.nn.dot_product_attention`, in a seventh less time for a whole ViT-S.

    The softmax's denominator divides the result instead of the weights, and the heads stand before the tokens until
    then.
    """
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum("BTNK,BSNK->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    mixed = jnp.einsum("BNTS,BSNK->BNTK", scores.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / scores.sum(-1, keepdims=True)).astype(value.dtype).swapaxes(1, 2)


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Return `depth` layers as one module, its parameters stacked along a new first axis."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


UNROLL = False  # whether stacked layers become a loop in the program, or one after the other


def run(layers: nnx.Module, x: Any, start: int, stop: int, *, remat: bool = False, context: Any = ()) -> Any:
    """Apply the stacked layers `start` to `stop` one after the other: compiled once, whatever their number.

    `context` is passed to each of them after x; `remat` recomputes their insides where gradients are taken.
    """
    graph, state = nnx.split(layers)

    def step(x, layer):
        return nnx.merge(graph, layer)(x, *context), None

    state = jax.tree.map(lambda parameter: parameter[start:stop], state)
    return lax.scan(jax.checkpoint(step) if remat else step, x, state, unroll=UNROLL)[0]
