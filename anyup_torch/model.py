"""AnyUp in PyTorch: the universal feature upsampler (arXiv 2510.12764), NCHW."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core import checks, visualize
from anyup_core.checks import OutputSize
from anyup_core.config import AnyUpConfig
from anyup_core.geometry import AxisWindow, axis_window
from anyup_torch import streaming
from anyup_torch.attention import check_backend, window_attention
from anyup_torch.image_code import ImageCode, Map, Size
from anyup_torch.layers import ConvEncoder, FeatureUnification, ResBlock, RMSNorm, RoPE

host_window: Any = torch.compiler.disable(axis_window)  # exact only in numpy, so it is not traced


class FeatureEncoder(nn.Sequential):
    """Feature unification and two ResBlocks: features of any width become D channels."""

    def __init__(self, config: AnyUpConfig):
        unify = FeatureUnification(config.filters, config.kernel_size_lfu, config.init_gaussian_derivatives)
        super().__init__(unify, ResBlock(config.filters, config.qk_dim), ResBlock(config.qk_dim, config.qk_dim))

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        return super().forward(F.normalize(features, dim=1, eps=1e-12))


class Projections(nn.Module):
    """Norms and projections of queries and keys; holds the parameters of the published attention module."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def project_query(self, query: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.linear(self.norm_q(query), *self._part(0))

    def project_key(self, key: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.linear(self.norm_k(key), *self._part(1))

    def _part(self, index: int) -> tuple[Tensor, Tensor]:
        # the third part, for values, and out_proj never reach the output: the raw values are averaged
        return self.attention.in_proj_weight.chunk(3)[index], self.attention.in_proj_bias.chunk(3)[index]


class CrossAttention(nn.Module):
    """Normalises and projects queries and keys, then averages the raw values a query's window holds."""

    def __init__(self, config: AnyUpConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.cross_attn = Projections(config.qk_dim, config.num_heads)
        self.conv2d = nn.Conv2d(config.qk_dim, config.qk_dim, 3, padding=1, bias=False)

    def forward(
        self,
        query: Float[Tensor, "B D Ho Wo"],
        maps: Sequence[Map],
        windows: Sequence[tuple[AxisWindow, AxisWindow]],
        *,
        backend: str,
        q_chunk_size: int | None,
    ) -> list[Float[Tensor, "B _ Ho Wo"]]:
        """Return one output a map; `windows` holds the rows' and the columns' window of each map."""
        query = self.cross_attn.project_query(self.conv2d(query).permute(0, 2, 3, 1))
        options = dict(num_heads=self.num_heads, backend=backend, q_chunk_size=q_chunk_size)
        attend = functools.partial(window_attention, **options)
        outputs = (
            attend(query, self.project_key(key), values.permute(0, 2, 3, 1), *window)
            for (key, values), window in zip(maps, windows)
        )
        return [output.permute(0, 3, 1, 2) for output in outputs]

    def project_key(self, key: Float[Tensor, "B D h w"]) -> Float[Tensor, "B h w D"]:
        return self.cross_attn.project_key(key.permute(0, 2, 3, 1))

    def project_rows(self, query: Float[Tensor, "B _ Wo D"]) -> Float[Tensor, "B _ Wo D"]:
        """Project rows of queries, given with one more row at either end."""
        query = F.conv2d(query.permute(0, 3, 1, 2), self.conv2d.weight, padding=(0, 1)).permute(0, 2, 3, 1)
        return self.cross_attn.project_query(query)


class AnyUp(nn.Module):
    """Upsamples the features of any vision encoder to any resolution, guided by the image.

    Args:
        config: the architecture.
    """

    def __init__(self, config: AnyUpConfig = AnyUpConfig()):
        super().__init__()
        checks.check_model(config)
        check_backend(config.backend, config.window)
        self.config = config
        self.image_encoder = ConvEncoder(config.input_dim, config.qk_dim, config.kernel_size)
        self.key_encoder = ConvEncoder(config.qk_dim, config.qk_dim)
        self.query_encoder = ConvEncoder(config.qk_dim, config.qk_dim)
        self.key_features_encoder = FeatureEncoder(config)
        self.cross_decode = CrossAttention(config)
        self.aggregation = ConvEncoder(2 * config.qk_dim, config.qk_dim, 3)
        self.rope = RoPE(config.qk_dim)

    def forward(
        self,
        image: Float[Tensor, "B input_dim H W"],
        features: Float[Tensor, "B C h w"],
        output_size: OutputSize | None = None,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
        values: Float[Tensor, "B E h w"] | None = None,
        *,
        check: bool = False,
    ) -> Float[Tensor, "B E Ho Wo"]:
        """Return `values` (default: the features) upsampled to `output_size` (default: the image's).

        Args:
            image: guidance, normalised with the ImageNet mean and standard deviation.
            features: any encoder's feature map of the same view, of any size and number of channels.
            output_size: height and width of the output, any positive size; or one number for both.
            vis_attn: also show the attention: colours of a wheel over the feature map, sent through the attention.
            q_chunk_size: query positions worked on at once; bounds memory, never changes the result.
            values: what is averaged instead of the features: class logits, colours, a projection. The output is
                linear in it, so a linear head may as well be applied before upsampling.
            check: also look for values that are not finite; costs a pass over the inputs.

        In eager inference the output's memory is in channels-last order; its shape is NCHW as always.

        Raises:
            ValueError, TypeError: for shapes, types or sizes that do not fit; the message says what would.
        """
        size = checks.check_inputs(self.config, "NCHW", image, features, output_size, q_chunk_size, values)
        if check:
            check_finite(image=image, features=features, values=values)
        if vis_attn:
            self.show_attention(image, features, size, q_chunk_size)
        return self._upsample(image, [features], [features if values is None else values], size, q_chunk_size)[0]

    def _upsample(
        self, image: Tensor, features: Sequence[Tensor], values: Sequence[Tensor], size: Size, q_chunk_size: int | None
    ) -> list[Tensor]:
        """Upsample several feature maps of one image; the inputs have been checked."""
        grids = [grid_of(maps) for maps in features]
        for grid in grids:
            self.windows(size, grid)  # refuses windows without keys before the work begins
        image, *features = (tensor.to(self.dtype) for tensor in (image, *features))
        wide = [x.to(self.widened(x.dtype)) for x in values]
        if streaming.possible(self, image, *features, *wide):
            outputs = streaming.upsample(self, image, features, wide, size, q_chunk_size)
        else:
            code = self.encode_image(image, grids, [size])
            keys = [self.describe(code, maps) for maps in features]
            outputs = self.decode(code, list(zip(keys, wide)), size, q_chunk_size)
        return [output.to(x.dtype) for output, x in zip(outputs, values)]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters and so of the computation; outputs have the type of the values."""
        return self.rope.freqs.dtype

    def widened(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which values of `dtype` are averaged: no narrower, but float64 only in a model of that type."""
        kept = dtype if dtype != torch.float64 else torch.float32
        return torch.promote_types(kept, self.dtype)

    def encode_image(
        self, image: Float[Tensor, "B input_dim H W"], grids: Sequence[Size], sizes: Sequence[Size]
    ) -> ImageCode:
        """Do what depends on the image alone, in one pass, for feature maps of all `grids` and outputs of all `sizes`.

        Args:
            image: guidance, normalised with the ImageNet mean and standard deviation.
            grids: heights and widths of the feature maps that are to be upsampled.
            sizes: heights and widths of the outputs.
        """
        image = image.to(self.dtype)
        if streaming.possible(self, image):
            return streaming.encode_image(self, image, grids, sizes)
        guide = self.rope(self.image_encoder(image))
        return ImageCode(pool(self.key_encoder(guide), grids), pool(self.query_encoder(guide), sizes))

    def describe(self, code: ImageCode, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Return the keys of a feature map: the image's keys on its grid, aggregated with the features' description.

        Raises:
            ValueError: if the image was not encoded for the grid (h, w).
        """
        key = code.key(grid_of(features))
        return self.aggregation(torch.cat([key, self.key_features_encoder(features.to(self.dtype))], 1))

    def decode(
        self, code: ImageCode, maps: Sequence[Map], size: Size, q_chunk_size: int | None = None
    ) -> list[Float[Tensor, "B _ Ho Wo"]]:
        """Average the values of each map with the attention of one set of queries.

        Args:
            code: the encoded images.
            maps: keys, as `describe` returns them, and values (B, E, h, w) of each feature map; E may differ.
            size: height and width of the outputs.
            q_chunk_size: query positions worked on at once; bounds memory, never changes the result.

        Raises:
            ValueError: if the image was not encoded for the size, or keys and values differ in batch or grid.
        """
        for key, values in maps:
            if key.shape[2:] != values.shape[2:] or len(key) != len(values):
                raise ValueError(
                    f"keys {tuple(key.shape)} and values {tuple(values.shape)} differ in the batch size or the grid."
                )
        tensors = [tensor for pair in maps for tensor in pair]
        if maps and streaming.possible(self, *tensors, *code.queries.values()):
            return streaming.decode(self, code, maps, size, q_chunk_size)
        windows = [self.windows(size, grid_of(key)) for key, _ in maps]
        options = dict(backend=self.config.backend, q_chunk_size=q_chunk_size)
        return self.cross_decode(code.query(size), maps, windows, **options)

    def windows(self, size: Size, grid: Size) -> tuple[AxisWindow, AxisWindow]:
        """Return the windows of an output of this size over a grid of cells, along the rows and along the columns."""
        ratio, window = self.config.window_ratio, self.config.window
        return host_window(size[0], grid[0], ratio, window), host_window(size[1], grid[1], ratio, window)

    def show_attention(self, image: Tensor, features: Tensor, output_size: Size, q_chunk_size: int | None) -> None:
        """Show where every output position looks: a wheel of colours over the cells, sent through the attention."""
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise ImportError('vis_attn=True needs matplotlib: pip install "anyup-jax[viz]".') from error

        def upsample(colors):
            values = torch.from_numpy(colors).to(features).permute(2, 0, 1)[None]
            with torch.no_grad():
                pixels = self(image[:1], features[:1], output_size, q_chunk_size=q_chunk_size, values=values)
            return pixels[0].permute(1, 2, 0).float().cpu()

        pyplot.imshow(visualize.attention_picture(upsample, *features.shape[2:]))
        pyplot.axis("off")
        pyplot.show()

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
        from anyup_torch import pretrained

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
        from anyup_torch import pretrained

        options: dict[str, Any] = dict(private=private, revision=revision, message=message)
        return publishing.push(repository, pretrained.checkpoint(self), run=run, license=license, **options)


def grid_of(maps: Tensor) -> Size:
    """Return the height and width of NCHW maps."""
    return int(maps.shape[2]), int(maps.shape[3])


def pool(x: Float[Tensor, "B D H W"], sizes: Sequence[Size]) -> dict[Size, Float[Tensor, "B D _ _"]]:
    return {size: F.adaptive_avg_pool2d(x, size) for size in sizes}


def upsample_many(
    model: AnyUp,
    image: Float[Tensor, "B input_dim H W"],
    features: Sequence[Float[Tensor, "B _ _ _"]],
    output_size: OutputSize | None = None,
    q_chunk_size: int | None = None,
    values: Sequence[Float[Tensor, "B _ _ _"] | None] | None = None,
) -> list[Float[Tensor, "B _ Ho Wo"]]:
    """Upsample several feature maps of one image, such as layers or encoders, and return their outputs in order.

    The image is encoded once and queries are computed once for all maps, which is faster than separate calls; the
    outputs are the same.

    Args:
        model, image, output_size, q_chunk_size: as for `AnyUp.forward`.
        features: a list of feature maps (B, C, h, w) of the same view; C, h and w may differ from map to map.
        values: for each feature map what is averaged instead of it, or None for the features themselves.

    Raises:
        ValueError, TypeError: as for `AnyUp.forward`, for features or values that are not lists, for an empty list of
            features, and for a list of values of another length.
    """
    size = checks.check_maps(model.config, "NCHW", image, features, output_size, q_chunk_size, values)
    chosen = features if values is None else [y if x is None else x for x, y in zip(values, features)]
    return model._upsample(image, features, chosen, size, q_chunk_size)


def check_finite(**tensors: Float[Tensor, "..."] | None) -> None:
    """Raise ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.isfinite().all():
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} of shape {shape} holds NaN or infinity; the output would be NaN in its windows.")
