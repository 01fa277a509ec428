"""AnyUp in Flax nnx: the universal feature upsampler (arXiv 2510.12764), NHWC."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core import checks
from anyup_core.config import AnyUpConfig
from anyup_core.geometry import axis_window
from anyup_jax import sharding
from anyup_jax.attention import resolve, window_attention
from anyup_jax.layers import (
    Carried,
    Conv,
    Encoder,
    FeatureUnification,
    Linear,
    ResBlock,
    RMSNorm,
    RoPE,
    map_rows,
    pooling,
)
from anyup_jax.strips import WHOLE, Whole


class FeatureEncoder(nnx.Module):
    """Feature unification and two ResBlocks: features of any width become D channels."""

    def __init__(self, config: AnyUpConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        gaussian = config.init_gaussian_derivatives
        self.unify = FeatureUnification(config.filters, config.kernel_size_lfu, gaussian, dtype=dtype, rngs=rngs)
        self.block1 = ResBlock(config.filters, config.qk_dim, dtype=dtype, rngs=rngs)
        self.block2 = ResBlock(config.qk_dim, config.qk_dim, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "B h w C"]) -> Float[Array, "B h w D"]:
        square = jnp.square(features).sum(-1, keepdims=True)
        norm = jnp.sqrt(jnp.where(square > 0, square, 1))  # a zero vector stays zero, and its gradient finite
        return self.block2(self.block1(self.unify(features / jnp.maximum(norm, 1e-12))))


class CrossAttention(nnx.Module):
    """Normalises and projects queries and keys, then averages the raw values a query's window holds."""

    def __init__(self, config: AnyUpConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dim = config.qk_dim
        self.num_heads = config.num_heads
        self.conv = Conv(dim, dim, 3, padding="zeros", dtype=dtype, rngs=rngs)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)
        self.query = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.key = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.value = Linear(dim, dim, dtype=dtype, rngs=rngs)  # never reaches the output; part of in_proj in PyTorch
        self.out = Linear(dim, dim, dtype=dtype, rngs=rngs, variable=Carried)

    def __call__(
        self, query, key, values, rows, cols, *, backend, q_chunk_size, strip=WHOLE
    ) -> Float[Array, "B Ho Wo E"]:
        query = self.project_query(query, strip)
        key = self.key(self.norm_k(key))
        options = dict(num_heads=self.num_heads, backend=backend, q_chunk_size=q_chunk_size, strip=strip.index())
        return window_attention(query, key, values, rows, cols, **options)

    def project_query(self, query: Float[Array, "B _ Wo D"], strip: Whole = WHOLE) -> Float[Array, "B _ Wo D"]:
        return map_rows(lambda query: self.query(self.norm_q(query)), self.conv(query, strip))


class AnyUp(nnx.Module):
    """Upsamples the features of any vision encoder to any resolution, guided by the image.

    Args:
        config: the architecture.
        rngs: random streams for the initial parameters.
        dtype: type of the computation, float32 or bfloat16; parameters are float32 either way.
    """

    def __init__(self, config: AnyUpConfig = AnyUpConfig(), *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        dim, build = config.qk_dim, functools.partial(Encoder, dtype=dtype, rngs=rngs)
        resolve(config.backend)
        self.config = config
        self.dtype = dtype
        self.image_encoder = build(config.input_dim, dim, config.kernel_size)
        self.key_encoder = build(dim, dim)
        self.query_encoder = build(dim, dim)
        self.key_features_encoder = FeatureEncoder(config, dtype=dtype, rngs=rngs)
        self.cross_decode = CrossAttention(config, dtype=dtype, rngs=rngs)
        self.aggregation = build(2 * dim, dim, 3)
        self.rope = RoPE(dim)

    def __call__(
        self,
        image: Float[Array | np.ndarray, "B H W input_dim"],
        features: Float[Array | np.ndarray, "B h w C"],
        output_size: tuple[int, int] | None = None,
        q_chunk_size: int | None = None,
        values: Float[Array | np.ndarray, "B h w E"] | None = None,
        *,
        check: bool = False,
    ) -> Float[Array, "B Ho Wo E"]:
        """Return `values` (default: the features) upsampled to `output_size` (default: the image's).

        Args:
            image: guidance, normalised with the ImageNet mean and standard deviation.
            features: any encoder's feature map of the same view, of any size and number of channels.
            output_size: height and width of the output, any positive size.
            q_chunk_size: query positions worked on at once; bounds memory, never changes the result.
            values: what is averaged instead of the features: class logits, colours, a projection. The output is
                linear in it, so a linear head may as well be applied before upsampling.
            check: also look for values that are not finite; costs a pass over the inputs, not possible inside jit.

        Raises:
            ValueError, TypeError: for shapes, types or sizes that do not fit; the message says what would.
        """
        size = checks.check_inputs(self.config, "NHWC", image, features, output_size, q_chunk_size, values)
        if check:
            check_finite(image=image, features=features, values=values)
        return self.attend(image, features, features if values is None else values, size, q_chunk_size)

    def attend(
        self,
        image: Float[Array | np.ndarray, "B Hs W input_dim"],
        features: Float[Array | np.ndarray, "B h w C"],
        values: Float[Array | np.ndarray, "B h w E"],
        size: tuple[int, int],
        q_chunk_size: int | None,
        strip: Whole = WHOLE,
    ) -> Float[Array, "B Hos Wo E"]:
        """Do the work of a call on a strip of the image; `size` is the size of the whole output."""
        features, values = jnp.asarray(features), jnp.asarray(values)
        shape = (size[0] // strip.count, size[1])
        guide, key, spare = self.encode(image, self.key_features_encoder(features), strip)
        pool = None if shape == guide.shape[1:3] else pooling(shape)
        query, _ = self.query_encoder.overwrite(guide, pool, spare, strip)
        return self.decode(query, key, values, size, q_chunk_size, strip)

    def encode(
        self,
        image: Float[Array | np.ndarray, "B Hs W input_dim"],
        described: Float[Array, "B h w D"],
        strip: Whole = WHOLE,
    ) -> tuple[Float[Array, "B Hs W D"], Float[Array, "B h w D"], Float[Array, "B Hs W D"]]:
        """Return all that depends on the image and not on the output's size: the guide, the keys and a spare map.

        `described` is what `key_features_encoder` makes of the features.
        """
        cells = described.shape[1:3]
        guide, spare = self.image_encoder.overwrite(jnp.asarray(image, self.dtype), strip=strip)
        guide = self.rope(guide, strip)
        key, spare = self.key_encoder.overwrite(guide, lambda x: strip.pool_cells(x, cells), spare, strip)
        # queries wait for the keys, so that one's memory serves the other; image by image, as NaN times 0 is NaN
        guide = guide + 0 * key.mean((1, 2, 3), keepdims=True, dtype=guide.dtype)
        return guide, self.aggregation(jnp.concatenate([key, described], -1)), spare

    def decode(
        self,
        query: Float[Array, "B Hos Wo D"],
        key: Float[Array, "B h w D"],
        values: Float[Array, "B h w E"],
        size: tuple[int, int],
        q_chunk_size: int | None = None,
        strip: Whole = WHOLE,
    ) -> Float[Array, "B Hos Wo E"]:
        """Average the values with the attention of encoded queries and keys; `size` is the size of the whole output."""
        windows = self.config.window_ratio, self.config.window
        rows, cols = (axis_window(n, m, *windows) for n, m in zip(size, key.shape[1:3]))
        options = dict(backend=self.config.backend, q_chunk_size=q_chunk_size, strip=strip)
        return self.cross_decode(query, key, values, rows, cols, **options)


def upsample(
    model: AnyUp,
    image: Float[Array | np.ndarray, "B H W input_dim"],
    features: Float[Array | np.ndarray, "B h w C"],
    output_size: tuple[int, int] | None = None,
    q_chunk_size: int | None = None,
    values: Float[Array | np.ndarray, "B h w E"] | None = None,
) -> Float[Array, "B Ho Wo E"]:
    """Call the model as one compiled program, compiled once per set of shapes; arguments as for `AnyUp.__call__`.

    An image whose rows are spread over the devices of a mesh axis, `NamedSharding(mesh, PartitionSpec(None, "rows"))`,
    is upsampled where it is: every device computes its own rows of the output.

    Raises:
        ValueError, TypeError: as for `AnyUp.__call__`, and for rows that cannot be spread evenly.
    """
    size = checks.check_inputs(model.config, "NHWC", image, features, output_size, q_chunk_size, values)
    if (spread := sharding.row_sharding(image)) is not None:
        sharding.check(model.config, image.shape, size, spread.mesh, spread.spec)
        arguments = image, *(sharding.place(x, spread) for x in (features, values)), size, q_chunk_size
        return sharding.compiled(*nnx.split(model), *arguments, spread.mesh, spread.spec)
    return compiled(*nnx.split(model), image, features, values, size, q_chunk_size)


@functools.partial(jax.jit, static_argnames=("graph", "output_size", "q_chunk_size"))
def compiled(
    graph: nnx.GraphDef, state: nnx.State, image, features, values, output_size, q_chunk_size
) -> Float[Array, "B Ho Wo E"]:
    """The program behind `upsample`; `compiled.lower(...)` shows what it costs."""
    return nnx.merge(graph, state)(image, features, output_size, q_chunk_size, values)


def check_finite(**arrays: Float[Array, ...] | None) -> None:
    """Raise ValueError naming the first array that holds NaN or infinity, TypeError inside a traced function."""
    for name, array in arrays.items():
        if isinstance(array, jax.core.Tracer):
            raise TypeError(
                "check=True reads the values of its inputs, which jit and grad do not have; check before calling them."
            )
        if array is not None and not jnp.isfinite(array).all():
            raise ValueError(
                f"{name} of shape {array.shape} holds NaN or infinity; the output would be NaN in its windows."
            )
