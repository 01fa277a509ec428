"""AnyUp in PyTorch: the universal feature upsampler (arXiv 2510.12764), NCHW."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core import checks, visualize
from anyup_core.config import AnyUpConfig
from anyup_core.geometry import axis_window
from anyup_torch import streaming
from anyup_torch.attention import check_backend, window_attention
from anyup_torch.layers import Encoder, FeatureUnification, ResBlock, RMSNorm, RoPE

host_window = torch.compiler.disable(axis_window)  # exact only in numpy, so it is not traced


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

    def forward(self, query, key, values, rows, cols, *, backend, q_chunk_size) -> Float[Tensor, "B E Ho Wo"]:
        query = self.cross_attn.project_query(self.conv2d(query).permute(0, 2, 3, 1))
        key = self.cross_attn.project_key(key.permute(0, 2, 3, 1))
        options = dict(num_heads=self.num_heads, backend=backend, q_chunk_size=q_chunk_size)
        output = window_attention(query, key, values.permute(0, 2, 3, 1), rows, cols, **options)
        return output.permute(0, 3, 1, 2)


class AnyUp(nn.Module):
    """Upsamples the features of any vision encoder to any resolution, guided by the image.

    Args:
        config: the architecture.
    """

    def __init__(self, config: AnyUpConfig = AnyUpConfig()):
        super().__init__()
        check_backend(config.backend, config.window)
        self.config = config
        self.image_encoder = Encoder(config.input_dim, config.qk_dim, config.kernel_size)
        self.key_encoder = Encoder(config.qk_dim, config.qk_dim)
        self.query_encoder = Encoder(config.qk_dim, config.qk_dim)
        self.key_features_encoder = FeatureEncoder(config)
        self.cross_decode = CrossAttention(config)
        self.aggregation = Encoder(2 * config.qk_dim, config.qk_dim, 3)
        self.rope = RoPE(config.qk_dim)

    def forward(
        self,
        image: Float[Tensor, "B input_dim H W"],
        features: Float[Tensor, "B C h w"],
        output_size: tuple[int, int] | None = None,
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
            output_size: height and width of the output, any positive size.
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
        values, cells = features if values is None else values, tuple(features.shape[2:])
        rows, cols = (host_window(n, m, self.config.window_ratio, self.config.window) for n, m in zip(size, cells))
        if vis_attn:
            self.show_attention(image, features, size, q_chunk_size)
        if streaming.possible(self, image, features, values):
            return streaming.upsample(self, image, features, values, rows, cols, q_chunk_size)

        guide = self.rope(self.image_encoder(image))
        query = F.adaptive_avg_pool2d(self.query_encoder(guide), size)
        key = F.adaptive_avg_pool2d(self.key_encoder(guide), cells)
        key = self.combine(key, features)
        options = dict(backend=self.config.backend, q_chunk_size=q_chunk_size)
        return self.cross_decode(query, key, values, rows, cols, **options)

    def combine(self, key: Float[Tensor, "B D h w"], features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Aggregate what the image and what the features say of each cell."""
        return self.aggregation(torch.cat([key, self.key_features_encoder(features)], 1))

    def show_attention(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], q_chunk_size: int | None
    ) -> None:
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


def check_finite(**tensors: Float[Tensor, ...] | None) -> None:
    """Raise ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.isfinite().all():
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} of shape {shape} holds NaN or infinity; the output would be NaN in its windows.")
