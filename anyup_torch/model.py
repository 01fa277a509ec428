"""AnyUp in PyTorch: the universal feature upsampler (arXiv 2510.12764), NCHW."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core import checks, geometry, visualize
from anyup_core.checks import OutputSize
from anyup_core.config import AnyUpConfig
from anyup_core.geometry import AxisWindow, axis_window
from anyup_core.preprocessing import IMAGENET, Preprocessing
from anyup_torch import streaming
from anyup_torch.anatomy import anatomy, called_plainly
from anyup_torch.attention import check_backend, window_attention
from anyup_torch.attention.module import call_module
from anyup_torch.image_code import ImageCode, Map, Size
from anyup_torch.layers import ConvEncoder, FeatureUnification, ResBlock, RMSNorm, RoPE

attention: Any = window_attention  # whose type the wrapper against tracing hides
host_window: Any = torch.compiler.disable(axis_window)  # exact only in numpy, so it is not traced


class FeatureEncoder(nn.Sequential):
    """Feature unification and two ResBlocks: features of any width become D channels."""

    def __init__(self, config: AnyUpConfig):
        unify = FeatureUnification(config.filters, config.kernel_size_lfu, config.init_gaussian_derivatives)
        super().__init__(unify, ResBlock(config.filters, config.qk_dim), ResBlock(config.qk_dim, config.qk_dim))

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        return super().forward(F.normalize(features, dim=1, eps=1e-12))


class Projections(nn.Module):
    """Norms and projections of queries and keys, and the attention; has the published attention module's parameters."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.attention.out_proj.requires_grad_(False)  # it never reaches the output, and DDP waits for every gradient

    def forward(
        self,
        query: Float[Tensor, "B Ho Wo D"],
        keys: Sequence[Float[Tensor, "B _ _ D"]],
        values: Sequence[Float[Tensor, "B _ _ _"]],
        windows: Sequence[tuple[AxisWindow, AxisWindow]],
        *,
        backend: str,
        q_chunk_size: int | None,
    ) -> list[Float[Tensor, "B Ho Wo _"]]:
        """Return one average of values for each map of keys and values; the channels come last."""
        maps = zip(keys, values, windows)
        if type(self.attention) is not nn.MultiheadAttention or not called_plainly(self.attention):
            query = self.norm_q(query)
            return [
                call_module(self.attention, query, self.norm_k(key), seen, window, q_chunk_size=q_chunk_size)
                for key, seen, window in maps
            ]
        query = self.project_query(query)
        options, attend = (
            dict(num_heads=self.attention.num_heads, backend=backend, q_chunk_size=q_chunk_size),
            attention,
        )
        return [attend(query, self.project_key(key), seen, *window, **options) for key, seen, window in maps]

    def project_query(self, query: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.linear(self.norm_q(query), *self._part(0))

    def project_key(self, key: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.linear(self.norm_k(key), *self._part(1))

    def _part(self, index: int) -> tuple[Tensor, Tensor]:
        # the third part, for values, and out_proj never reach the output: the raw values are averaged
        return self.attention.in_proj_weight.chunk(3)[index], self.attention.in_proj_bias.chunk(3)[index]


class CrossAttention(nn.Module):
    """Normalises and projects queries and keys, then averages the raw values a query's window holds.

    Attributes:
        config: the model's settings; `window_ratio` may be read and set.
    """

    def __init__(self, config: AnyUpConfig):
        super().__init__()
        self.config = config
        self.cross_attn = Projections(config.qk_dim, config.num_heads)
        self.conv2d = nn.Conv2d(config.qk_dim, config.qk_dim, 3, padding=1, bias=False)

    @property
    def window_ratio(self) -> float:
        return self.config.window_ratio

    @window_ratio.setter
    def window_ratio(self, ratio: float) -> None:
        self.config = self.config.replace(window_ratio=ratio)

    def forward(
        self,
        query: Float[Tensor, "B D Ho Wo"],
        key: Float[Tensor, "B D h w"] | Sequence[Float[Tensor, "B D _ _"]],
        values: Float[Tensor, "B E h w"] | Sequence[Float[Tensor, "B _ _ _"]],
        q_chunk_size: int | None = None,
    ) -> Any:
        """Return the output (B, E, Ho, Wo); for lists of keys and values a list."""
        single = isinstance(key, Tensor)
        keys, maps = (channels_last([one] if isinstance(one, Tensor) else one) for one in (key, values))
        windows = [self.windows(grid_of(query), (int(one.shape[1]), int(one.shape[2]))) for one in keys]
        query = self.conv2d(query).permute(0, 2, 3, 1)
        outputs = self.cross_attn(query, keys, maps, windows, backend=self.config.backend, q_chunk_size=q_chunk_size)
        outputs = [output.permute(0, 3, 1, 2) for output in outputs]
        return outputs[0] if single else outputs

    def windows(self, size: Size, grid: Size) -> tuple[AxisWindow, AxisWindow]:
        """Return the windows of an output of this size over a grid of cells, along the rows and along the columns."""
        ratio, window = self.config.window_ratio, self.config.window
        return host_window(size[0], grid[0], ratio, window), host_window(size[1], grid[1], ratio, window)

    def project_key(self, key: Float[Tensor, "B D h w"]) -> Float[Tensor, "B h w D"]:
        return self.cross_attn.project_key(key.permute(0, 2, 3, 1))

    def project_rows(self, query: Float[Tensor, "B _ Wo D"]) -> Float[Tensor, "B _ Wo D"]:
        """Project rows of queries, given with one more row at either end."""
        query = F.conv2d(query.permute(0, 3, 1, 2), self.conv2d.weight, padding=(0, 1)).permute(0, 2, 3, 1)
        return self.cross_attn.project_query(query)


class AnyUp(nn.Module):
    """Upsamples the features of any vision encoder to any resolution, guided by the image.

    Submodules may be replaced, hooked or parametrised, and settings of `config` changed through `window_ratio` or
    `replace`. In eager inference of unchanged submodules the same is computed with a fraction of the memory.

    Args:
        config: the settings; the default ones if None.
        fields: fields of `AnyUpConfig` that differ from these; `use_natten=True` is `window="natten"`.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have, a backend that cannot compute the window, and parameters that do not
            fit in memory.
        ImportError: if the backend needs a package that is not installed.
    """

    def __init__(self, config: AnyUpConfig | None = None, **fields: Any):
        super().__init__()
        config = AnyUpConfig.of(config, **fields)
        checks.check_model(config)
        check_backend(config.backend, config.window)
        self._config = config
        self.image_encoder = ConvEncoder(config.input_dim, config.qk_dim, config.kernel_size)
        self.key_encoder = ConvEncoder(config.qk_dim, config.qk_dim)
        self.query_encoder = ConvEncoder(config.qk_dim, config.qk_dim)
        self.key_features_encoder = FeatureEncoder(config)
        self.cross_decode = CrossAttention(config)
        self.aggregation = ConvEncoder(2 * config.qk_dim, config.qk_dim, 3)
        self.rope = RoPE(config.qk_dim)
        self._anatomy = anatomy(self)

    @property
    def config(self) -> AnyUpConfig:
        """The settings, as they are now."""
        return getattr(self.cross_decode, "config", self._config)

    channels: int | None = None  # of the features: any number
    multiple: int = 1  # of which the number of channels is a multiple
    normalisation: Preprocessing = IMAGENET

    def native_size(self, image: Tensor, features: Tensor) -> Size:
        """Return height and width of the output where no other is asked for: the image's."""
        return grid_of(image)

    @property
    def qk_dim(self) -> int:
        return self.config.qk_dim

    @property
    def lfu_dim(self) -> int:
        return self.config.filters

    @property
    def window_ratio(self) -> float:
        """Half-width of the attention window as a share of the feature map, the same as `cross_decode.window_ratio`."""
        return self.config.window_ratio

    @window_ratio.setter
    def window_ratio(self, ratio: float) -> None:
        self.cross_decode.window_ratio = ratio

    def replace(self, **changes: Any) -> AnyUp:
        """Return a model of the same parameters, not of copies, with other settings: `model.replace(window_ratio=0.2)`.

        Raises:
            TypeError, ValueError, ImportError: for settings that do not exist, that are impossible or that contradict
                the shapes of the parameters.
        """
        config = self.config.same_weights(**changes)
        check_backend(config.backend, config.window)
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        model = copy.deepcopy(self, shared)
        model.cross_decode.config = config
        weights = model.cross_decode.cross_attn.attention
        weights.num_heads, weights.head_dim = config.num_heads, config.head_dim
        return model

    @property
    def changed(self) -> list[str]:
        """The submodules that have been replaced, hooked or parametrised since the model was made."""
        now = anatomy(self)
        return [name for name in sorted({*now, *self._anatomy}) if now.get(name) != self._anatomy.get(name)]

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
            options = dict(output_size=size, q_chunk_size=q_chunk_size)
            show_attention(lambda values: self(image[:1], features[:1], values=values, **options), features)
        return self._upsample(image, [features], [features if values is None else values], size, q_chunk_size)[0]

    def _upsample(
        self, image: Tensor, features: Sequence[Tensor], values: Sequence[Tensor], size: Size, q_chunk_size: int | None
    ) -> list[Tensor]:
        """Upsample several feature maps of one image; the inputs have been checked."""
        grids = [grid_of(maps) for maps in features]
        for grid in grids if isinstance(self.cross_decode, CrossAttention) else ():
            self.cross_decode.windows(size, grid)  # refuses windows without keys before the work begins
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
        return next(self.parameters()).dtype

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
        return self._encode_guide(self._rotate(self.image_encoder(image)), grids, sizes)

    def _rotate(self, guide: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        if isinstance(self.rope, RoPE):
            return self.rope(guide)
        rows, cols = (torch.from_numpy(axis).to(guide) for axis in geometry.coordinates(*grid_of(guide)))
        coords = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).flatten(0, 1)[None]
        rotated = self.rope(guide.flatten(2).transpose(1, 2), coords)  # somebody's own, called as the published one
        return rotated.transpose(1, 2).unflatten(2, guide.shape[2:])

    def _encode_guide(self, guide: Float[Tensor, "B D H W"], grids: Sequence[Size], sizes: Sequence[Size]) -> ImageCode:
        return ImageCode(pool(self.key_encoder(guide), grids), pool(self.query_encoder(guide), sizes))

    def upsample(
        self,
        enc_img: Float[Tensor, "B D H W"],
        feats: Float[Tensor, "B C h w"],
        out_size: OutputSize,
        vis_attn: bool = False,
        q_chunk_size: int | None = None,
    ) -> Float[Tensor, "B C Ho Wo"]:
        """Upsample features with an image that is encoded and rotated, `rope(image_encoder(image))`.

        The published model has this method; see `encode_image`, `describe` and `decode` for several feature maps.

        Raises:
            ValueError, TypeError: as for `forward`.
        """
        config = self.config.replace(input_dim=self.config.qk_dim)  # the guide stands where the image does
        size = checks.check_inputs(config, "NCHW", enc_img, feats, out_size, q_chunk_size, None)
        guide = enc_img.to(self.dtype)
        if vis_attn:
            show_attention(lambda values: self._decode_guide(guide[:1], feats[:1], values, size, q_chunk_size), feats)
        return self._decode_guide(guide, feats, feats, size, q_chunk_size).to(feats.dtype)

    def _decode_guide(self, guide: Tensor, feats: Tensor, values: Tensor, size: Size, chunk: int | None) -> Tensor:
        code = self._encode_guide(guide, [grid_of(feats)], [size])
        return self.decode(code, [(self.describe(code, feats), values.to(self.widened(values.dtype)))], size, chunk)[0]

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
            if key.shape[2:] != values.shape[2:] or key.shape[0] != values.shape[0]:
                raise ValueError(
                    f"keys {tuple(key.shape)} and values {tuple(values.shape)} differ in the batch size or the grid."
                )
        tensors = [tensor for pair in maps for tensor in pair]
        if maps and streaming.possible(self, *tensors, *code.queries.values()):
            return streaming.decode(self, code, maps, size, q_chunk_size)
        if len(maps) == 1:  # as the published model calls it
            return [self.cross_decode(code.query(size), *maps[0], q_chunk_size=q_chunk_size)]
        return self.cross_decode(code.query(size), *map(list, zip(*maps)), q_chunk_size=q_chunk_size) if maps else []

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


def show_attention(upsample: Callable[[Tensor], Tensor], features: Float[Tensor, "B C h w"]) -> None:
    """Show where every output position looks: a wheel of colours over the cells, sent through the attention.

    `upsample` upsamples values (1, 3, h, w) as the features of the first image are.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ImportError('vis_attn=True needs matplotlib: pip install "anyup-jax[viz]".') from error

    def upsample_colors(colors):
        with torch.no_grad():
            pixels = upsample(torch.from_numpy(colors).to(features).permute(2, 0, 1)[None])
        return pixels[0].permute(1, 2, 0).float().cpu().numpy()

    pyplot.imshow(visualize.attention_picture(upsample_colors, *features.shape[2:]))
    pyplot.axis("off")
    pyplot.show()


def grid_of(maps: Tensor) -> Size:
    """Return the height and width of NCHW maps."""
    return int(maps.shape[2]), int(maps.shape[3])


def channels_last(maps: Sequence[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B _ _ _"]]:
    return [one.permute(0, 2, 3, 1) for one in maps]


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
