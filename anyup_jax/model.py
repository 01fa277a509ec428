"""AnyUp in Flax nnx: the universal feature upsampler (arXiv 2510.12764), NHWC."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core import checks
from anyup_core.checks import OutputSize
from anyup_core.config import AnyUpConfig
from anyup_core.geometry import AxisWindow
from anyup_jax import sharding
from anyup_jax.attention import resolve, window_attention
from anyup_jax.blocked import map_rows
from anyup_jax.image_code import ImageCode, encode_image, native
from anyup_jax.layers import Conv, ConvEncoder, FeatureUnification, Linear, ResBlock, RMSNorm, RoPE, Unused
from anyup_jax.promotion import standard_promotion
from anyup_jax.row_shards import ALL_ROWS, Rows, Size

Map = tuple[Float[Array, "B _ _ D"], Float[Array | np.ndarray, "B _ _ _"]]  # keys of a feature map; what is averaged


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
    """Normalises and projects queries and keys, then averages the raw values in each query's window."""

    def __init__(self, config: AnyUpConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dim = config.qk_dim
        self.num_heads = config.num_heads
        self.conv = Conv(dim, dim, 3, padding="zeros", dtype=dtype, rngs=rngs)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)
        self.query = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.key = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.value = Linear(dim, dim, dtype=dtype, rngs=rngs)  # never reaches the output; part of in_proj in PyTorch
        self.out = Linear(dim, dim, dtype=dtype, rngs=rngs, variable=Unused)

    def __call__(
        self,
        query: Float[Array, "B _ Wo D"],
        maps: Sequence[Map],
        windows: Sequence[tuple[AxisWindow, AxisWindow]],
        *,
        backend: str,
        q_chunk_size: int | None,
        rows: Rows = ALL_ROWS,
    ) -> list[Float[Array, "B _ Wo _"]]:
        """Return one output a map; `windows` holds the rows' and the columns' window of each map."""
        query = self.project_query(query, rows)
        attend = functools.partial(window_attention, num_heads=self.num_heads, backend=backend, strip=rows.index())
        return [
            attend(query, self.key(self.norm_k(key)), jnp.asarray(values), *window, q_chunk_size=q_chunk_size)
            for (key, values), window in zip(maps, windows)
        ]

    def project_query(self, query: Float[Array, "B _ Wo D"], rows: Rows = ALL_ROWS) -> Float[Array, "B _ Wo D"]:
        return map_rows(lambda query: self.query(self.norm_q(query)), self.conv(query, rows))


class AnyUp(nnx.Module):
    """Upsamples the features of any vision encoder to any resolution, guided by the image.

    Args:
        config: the settings; the default ones if None.
        rngs: random streams for the initial parameters.
        dtype: type of the computation, float32 or bfloat16; parameters are float32 either way.
        fields: fields of `AnyUpConfig` that differ from these; `use_natten=True` is `window="natten"`.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have, and for parameters that do not fit in memory.
    """

    def __init__(
        self, config: AnyUpConfig | None = None, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, **fields: Any
    ):
        config = AnyUpConfig.of(config, **fields)
        dim, build = config.qk_dim, functools.partial(ConvEncoder, dtype=dtype, rngs=rngs)
        checks.check_model(config)
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

    def replace(self, **changes: Any) -> AnyUp:
        """Return a model of the same parameters with other settings: `model.replace(window_ratio=0.2)`.

        Raises:
            TypeError, ValueError: for settings that do not exist, that are impossible or that contradict the shapes of
                the parameters.
        """
        config = self.config.same_weights(**changes)
        resolve(config.backend)
        model = nnx.merge(*nnx.split(self))
        model.config, model.cross_decode.num_heads = config, config.num_heads
        return model

    @standard_promotion()
    def __call__(
        self,
        image: Float[Array | np.ndarray, "B H W input_dim"],
        features: Float[Array | np.ndarray, "B h w C"],
        output_size: OutputSize | None = None,
        q_chunk_size: int | None = None,
        values: Float[Array | np.ndarray, "B h w E"] | None = None,
        *,
        check: bool = False,
    ) -> Float[Array, "B Ho Wo E"]:
        """Return `values` (default: the features) upsampled to `output_size` (default: the image's).

        Args:
            image: guidance, normalised with the ImageNet mean and standard deviation.
            features: any encoder's feature map of the same view, of any size and any number of channels.
            output_size: height and width of the output, any positive size; or one number for both.
            q_chunk_size: query positions worked on at once; bounds memory, never changes the result.
            values: what is averaged instead of the features: class logits, colours, a projection. The output is
                linear in it, so a linear head may as well be applied before upsampling.
            check: also refuse values that are not finite; costs a pass over the inputs and is not possible inside jit.

        Raises:
            ValueError, TypeError: for shapes, types or sizes that do not fit; the message says what would.
        """
        size = checks.check_inputs(self.config, "NHWC", image, features, output_size, q_chunk_size, values)
        if check:
            check_finite(image=image, features=features, values=values)
        return self.attend(image, [(features, values)], size, q_chunk_size)[0]

    def attend(
        self,
        image: Float[Array | np.ndarray, "B _ W input_dim"],
        maps: Sequence[tuple[Array | np.ndarray, Array | np.ndarray | None]],
        size: Size,
        q_chunk_size: int | None = None,
        rows: Rows = ALL_ROWS,
    ) -> list[Float[Array, "B _ Wo _"]]:
        """Upsample features, or the values given beside them, of one image, or of some of its rows; checks no inputs.

        `size` is that of the whole output. In a program for any number of images they are upsampled one by one.
        """
        if not isinstance(image.shape[0], int):

            def attend_one(one):
                image, maps = jax.tree.map(lambda x: x[None], one)
                return [output[0] for output in self.attend(image, maps, size, q_chunk_size, rows)]

            return jax.lax.map(attend_one, (image, list(maps)))
        code = self.encode_image(image, [grid_of(features) for features, _ in maps], [size], rows)
        pairs = [(self.describe(code, features), features if values is None else values) for features, values in maps]
        return self.decode(code, pairs, size, q_chunk_size)

    @standard_promotion()
    def encode_image(
        self,
        image: Float[Array | np.ndarray, "B _ W input_dim"],
        grids: Sequence[Size],
        sizes: Sequence[Size],
        rows: Rows = ALL_ROWS,
    ) -> ImageCode:
        """Do what depends on the image alone, in one pass, for feature maps of all `grids` and outputs of all `sizes`.

        Args:
            image: guidance, normalised with the ImageNet mean and standard deviation.
            grids: heights and widths of the feature maps that are to be upsampled.
            sizes: heights and widths of the outputs.
            rows: which rows of the image are here; `sizes` are those of the whole output.
        """
        return encode_image(self, image, grids, sizes, rows)

    @standard_promotion()
    def describe(
        self,
        code: ImageCode,
        features: Float[Array | np.ndarray, "B h w C"],
        described: Float[Array, "B h w D"] | None = None,
    ) -> Float[Array, "B h w D"]:
        """Return the keys of a feature map: the image's keys on its grid, aggregated with the features' description.

        Args:
            code: the encoded images.
            features: the feature map.
            described: what `key_features_encoder` returns for the features, if it has been computed already.

        Raises:
            ValueError: if the image was not encoded for the grid (h, w).
        """
        key = code.key(grid_of(features))
        if described is None:
            described = self.key_features_encoder(jnp.asarray(native(features)))
        return self.aggregation(jnp.concatenate([key, described], -1))

    @standard_promotion()
    def decode(
        self, code: ImageCode, maps: Sequence[Map], size: Size, q_chunk_size: int | None = None
    ) -> list[Float[Array, "B _ Wo _"]]:
        """Average the values of each map with the attention of one set of queries.

        Args:
            code: the encoded images.
            maps: keys, as `describe` returns them, and values (B, h, w, E) of each feature map; E may differ.
            size: height and width of the outputs.
            q_chunk_size: query positions worked on at once; bounds memory, never changes the result.

        Raises:
            ValueError: if the image was not encoded for the size, or keys and values differ in batch or grid.
        """
        maps = native(list(maps))
        windows = [code.rows.windows(self.config, size, grid_of(key)) for key, _ in maps]
        backend, rows = self.config.backend, code.rows
        return self.cross_decode(code.query(size), maps, windows, backend=backend, q_chunk_size=q_chunk_size, rows=rows)

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        run: str | os.PathLike | None = None,
        license: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a folder that `from_pretrained` loads in both frameworks: configuration, weights and a model card.

        Args:
            folder: a new or an empty directory; its parent exists.
            run: the training run that the weights are of, for the card.
            license: identifier of the weights' licence on the hub, such as "apache-2.0", for the card.
            overwrite: replace a model that is there.

        Raises:
            FileExistsError, FileNotFoundError, PermissionError: if the folder cannot be written.
            ValueError: if `run` is no training run, or `license` no identifier.
        """
        from anyup_core.checkpoints import publishing
        from anyup_jax import pretrained

        publishing.save(folder, pretrained.checkpoint(self), run=run, license=license, overwrite=overwrite)

    def push_to_hub(
        self,
        repository: str,
        *,
        run: str | os.PathLike | None = None,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        message: str = "Upload AnyUp",
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, and return the address of the commit.

        Args:
            repository: "org/name"; it is created if there is none.
            run, license: as for `save_pretrained`.
            private: whether a new repository is private; None for the organisation's default.
            revision: the branch; None for the main one.
            message: of the commit.

        Raises:
            PermissionError, ConnectionError, FileNotFoundError: if the hub does not allow it or cannot be reached, or
                has no such branch.
            ValueError: as for `save_pretrained`, and if `repository` is no name.
        """
        from anyup_core.checkpoints import publishing
        from anyup_jax import pretrained

        options: dict[str, Any] = dict(private=private, revision=revision, message=message)
        return publishing.push(repository, pretrained.checkpoint(self), run=run, license=license, **options)


def grid_of(maps: Array | np.ndarray) -> Size:
    """Return the height and width of NHWC maps."""
    return maps.shape[1], maps.shape[2]


def upsample(
    model: AnyUp,
    image: Float[Array | np.ndarray, "B H W input_dim"],
    features: Float[Array | np.ndarray, "B h w C"],
    output_size: OutputSize | None = None,
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
    return _run(model, image, [(features, values)], size, q_chunk_size)[0]


def upsample_many(
    model: AnyUp,
    image: Float[Array | np.ndarray, "B H W input_dim"],
    features: Sequence[Float[Array | np.ndarray, "B _ _ _"]],
    output_size: OutputSize | None = None,
    q_chunk_size: int | None = None,
    values: Sequence[Float[Array | np.ndarray, "B _ _ _"] | None] | None = None,
) -> list[Float[Array, "B Ho Wo _"]]:
    """Upsample several feature maps of one image, such as layers or encoders, and return their outputs in order.

    The image is encoded once and queries are computed once for all maps, which is faster than separate calls; the
    outputs are the same. It is one compiled program, compiled once per set of shapes.

    Args:
        model, image, output_size, q_chunk_size: as for `upsample`.
        features: a list of feature maps (B, h, w, C) of the same view; h, w and C may differ from map to map.
        values: for each feature map what is averaged instead of it, or None for the features themselves.

    Raises:
        ValueError, TypeError: as for `upsample`, for features or values that are not lists, for an empty list of
            features, and for a list of values of another length.
    """
    size = checks.check_maps(model.config, "NHWC", image, features, output_size, q_chunk_size, values)
    maps = list(zip(features, [None] * len(features) if values is None else values))
    return _run(model, image, maps, size, q_chunk_size)


def _run(model: AnyUp, image, maps, size: Size, q_chunk_size: int | None) -> list[Float[Array, "B Ho Wo _"]]:
    """Call the compiled program for an image that is on one device, or spread over several."""
    image, maps = native((image, maps))
    if (spread := sharding.row_sharding(image)) is None:
        return compiled(*nnx.split(model), image, maps, size, q_chunk_size)
    sharding.check(model.config, image.shape, size, spread.mesh, spread.spec)
    maps = jax.device_put(maps, NamedSharding(spread.mesh, P(spread.spec[0])))  # whole, but for the batch
    return sharding.compiled(*nnx.split(model), image, maps, size, q_chunk_size, spread.mesh, spread.spec)


@functools.partial(jax.jit, static_argnames=("graph", "output_size", "q_chunk_size"))
def compiled(
    graph: nnx.GraphDef, state: nnx.State, image, maps, output_size, q_chunk_size
) -> list[Float[Array, "B Ho Wo _"]]:
    """The program behind `upsample` and `upsample_many`; `compiled.lower(...)` shows what it costs.

    `maps` are pairs of features and of values, or None instead of these.
    """
    return nnx.merge(graph, state).attend(image, maps, output_size, q_chunk_size)


def check_finite(**arrays: Float[Array | np.ndarray, "..."] | None) -> None:
    """Raise ValueError naming the first array that holds NaN or infinity, TypeError inside a traced function."""
    for name, array in arrays.items():
        if isinstance(array, Tracer):
            raise TypeError(
                "check=True reads the values of its inputs, which jit and grad do not have; check before calling them."
            )
        if array is not None and not jnp.isfinite(array).all():
            raise ValueError(
                f"{name} of shape {array.shape} holds NaN or infinity; the output would be NaN in its windows."
            )
