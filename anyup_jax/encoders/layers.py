"""Layers that several families of encoders share, NHWC. Parameters are float32; `dtype` is the type of the computation.

Norms are computed in float32 in every type. Matrix products take the precision of the context: `Encoder` asks for exact
float32 where it computes in float32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Queries = Float[Array, "B T N K"]  # of N heads
Keys = Float[Array, "B S N K"]  # and values
Padding = str | tuple[tuple[int, int], tuple[int, int]]

SCORES = 1 << 28  # of one image, held at once on a CPU: 1 GB

normal = nnx.initializers.normal(0.02, jnp.float32)
Linear = functools.partial(nnx.Linear, kernel_init=normal)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` computed in float32, its parameters included; the output has the type of the input."""

    def __init__(self, channels: int, *, epsilon: float, rngs: nnx.Rngs):
        super().__init__(channels, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        return super().__call__(x).astype(x.dtype)


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` in inference, computed in float32; the output has the type of the input."""

    def __init__(self, channels: int, *, epsilon: float, rngs: nnx.Rngs):
        super().__init__(channels, use_running_average=True, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        return super().__call__(x).astype(x.dtype)


class Conv(nnx.Conv):
    """`nnx.Conv` with k x k kernels; one of 1 x 1 is applied as a matrix product, which is faster on a CPU."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, padding: Padding = "VALID", **options):
        super().__init__(
            inputs, outputs, (size, size), (stride, stride), padding=padding, kernel_init=normal, **options
        )

    def __call__(self, x: Float[Array, "B H W inputs"]) -> Float[Array, "B h w outputs"]:
        if self.kernel_size != (1, 1) or self.use_bias:
            return super().__call__(x)
        rows, columns = self.strides
        return jnp.matmul(x[:, ::rows, ::columns].astype(self.dtype), self.kernel[0, 0].astype(self.dtype))


class DepthwiseConv(nnx.Module):
    """One k x k filter per channel, "SAME" padding as TensorFlow has it; kernel (k, k, 1, channels).

    A sum of shifted images, which XLA fuses into one loop: on a CPU several times as fast as the grouped convolution
    of `nnx.Conv`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        use_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(normal(rngs.params(), (kernel_size, kernel_size, 1, channels)))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32)) if use_bias else None
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


class ConvNorm(nnx.Module):
    """Convolution without bias, then batch norm; the zeros around the image are `padding`, by default half a kernel."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        edges = (kernel_size // 2, kernel_size // 2)
        padding = padding or (edges, edges)
        options: dict[str, Any] = dict(stride=stride, padding=padding, use_bias=False, dtype=dtype, rngs=rngs)
        self.conv = Conv(inputs, outputs, kernel_size, **options)
        self.norm = BatchNorm(outputs, epsilon=epsilon, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return self.norm(self.conv(x))


class ConvBackbone(nnx.Module):
    """A convolutional network, whose layers are computed one after the other."""

    def outputs(self, image: Float[Array, "B H W 3"]) -> Iterator[Float[Array, "B h w C"]]:
        """Yield the map of each layer; what follows the last one that is asked for is not computed."""
        raise NotImplementedError

    def intermediates(
        self, image: Float[Array, "B H W 3"], layers: tuple[int, ...], norm: bool
    ) -> list[tuple[Float[Array, "B h w C"], None]]:
        """Return the maps of these layers in rising order; `norm` changes nothing, as a final norm is the head's."""
        maps = itertools.islice(self.outputs(image), layers[-1] + 1)
        return [(x, None) for i, x in enumerate(maps) if i in layers]


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x Phi(x), Phi(x) = (1 + erf(x / sqrt(2))) / 2, computed in float32 and rounded as PyTorch rounds it.

    `jax.nn.gelu` computes in the type of x, and with erfc.
    """
    wide = x.astype(jnp.float32)
    return (wide * 0.5 * (1 + lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def attend(query: Queries, key: Keys, value: Keys) -> Queries:
    """Return softmax(q k^T / sqrt(K)) v per head; the softmax is float32."""
    return lax.platform_dependent(query, key, value, cpu=attend_on_cpu, default=jax.nn.dot_product_attention)


def attend_on_cpu(query: Queries, key: Keys, value: Keys) -> Queries:
    """Return the same as `jax.nn.dot_product_attention`, in a seventh less time for a whole ViT-S.

    The softmax's denominator divides the result instead of the weights, and the heads stay before the tokens until
    then. XLA holds the scores twice, 22 GB for a ViT-S/14 at 2048 x 2048, so that above `SCORES` only some rows are
    worked on at once.
    """
    tokens, heads = query.shape[1:3]
    rows = max(1, SCORES // (heads * key.shape[1]))
    if tokens <= rows:
        return attend_at_once(query, key, value)
    padded = jnp.pad(query, ((0, 0), (0, -tokens % rows), (0, 0), (0, 0)))
    blocks = rearrange(padded, "B (n T) N K -> n B T N K", T=rows)
    blocks = lax.map(lambda block: attend_at_once(block, key, value), blocks)
    return rearrange(blocks, "n B T N K -> B (n T) N K")[:, :tokens]


def attend_at_once(query: Queries, key: Keys, value: Keys) -> Queries:
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum("BTNK,BSNK->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    sums = jnp.einsum("BNTS,BSNK->BNTK", scores.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return rearrange((sums / scores.sum(-1, keepdims=True)).astype(value.dtype), "B N T K -> B T N K")


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Return `depth` layers as one module, its parameters stacked along a new first axis."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


UNROLL = False  # whether `run` compiles the stacked layers one after the other instead of as one loop


def run(layers: nnx.Module, x: Any, start: int, stop: int, *, remat: bool = False, context: Any = ()) -> Any:
    """Apply the stacked layers `start` to `stop` one after the other: compiled once, whatever their number.

    Each layer receives x and then the arrays of `context`; `remat` recomputes what is within a layer where gradients
    are taken.
    """
    graph, state = nnx.split(layers)

    def step(x, layer):
        return nnx.merge(graph, layer)(x, *context), None

    state = jax.tree.map(lambda parameter: parameter[start:stop], state)
    return lax.scan(jax.checkpoint(step) if remat else step, x, state, unroll=UNROLL)[0]
