"""The published formulas of JAFAR, FeatUp, LoftUp and NAF, written plainly in PyTorch: what ours are timed against.

Each function takes one of our models for its weights, and nothing else of it. Whole maps go from one operation to the
next; where that takes too much memory, `chunk` output positions (LoftUp, JAFAR, NAF) or rows (FeatUp) at a time do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyup_core.upsamplers import loftup as core
from anyup_core.upsamplers.featup import STAGES
from anyup_torch.upsamplers import JAFAR, NAF, FeatUp, LoftUp

Size = tuple[int, int]
CHUNKS = {"jafar": (512, 2048, 8192), "featup": (1, 4, 16), "loftup": (2048, 8192, 1 << 20), "naf": (256, 1024, 4096)}
"""Those that are tried; the fastest counts."""


def block(x: Tensor, layers: nn.Module) -> Tensor:
    for norm, conv in ((layers.norm1, layers.conv1), (layers.norm2, layers.conv2)):
        x = reflect_conv(F.silu(norm(x)), conv)
    return x


def reflect_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    half = conv.kernel_size[0] // 2
    return F.conv2d(F.pad(x, (half,) * 4, mode="reflect") if half else x, conv.weight, conv.bias)


def jafar(model: JAFAR, image: Tensor, features: Tensor, size: Size, chunk: int) -> Tensor:
    def encode(x: Tensor, encoder: nn.Sequential) -> Tensor:
        x = reflect_conv(x, encoder[0])
        for layers in list(encoder)[1:]:
            x = x + block(x, layers)
        return x

    guide = encode(image, model.image_encoder)
    height, width = guide.shape[2:]
    places = torch.stack(torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij"), -1)
    angle = (places.flatten(0, 1) @ model.rope.freqs).T.unflatten(1, (height, width))
    first, second = guide.chunk(2, 1)
    guide = guide * angle.cos() + torch.cat([-second, first], 1) * angle.sin()
    query = F.group_norm(F.adaptive_avg_pool2d(encode(guide, model.query_encoder), size), 8)
    key = F.adaptive_avg_pool2d(encode(guide, model.key_encoder), features.shape[2:])
    described = encode(F.normalize(features, dim=1), model.key_features_encoder)
    key = model.sft_key.gamma(described) * F.group_norm(key, 8) + model.sft_key.beta(described)
    decode, attention = model.cross_decode, model.cross_decode.cross_attn
    query, key, values = (x.flatten(2).transpose(1, 2) for x in (decode.conv2d(query), key, features))
    query, key, normed = attention.norm_q(query), attention.norm_k(key), attention.norm_v(values)
    weights = (attention.attention(part, key, normed)[1] for part in query.split(chunk, 1))
    return torch.cat([part @ values for part in weights], 1).transpose(1, 2).unflatten(2, size)


def featup(model: FeatUp, image: Tensor, features: Tensor, size: Size, chunk: int) -> Tensor:
    if model.config.channel_norm:
        features = model.model["1"](features)
    for stage in range(1, STAGES + 1):
        layers, side = model.upsampler.get_submodule(f"up{stage}"), tuple(2 * n for n in features.shape[2:])
        guidance = F.adaptive_avg_pool2d(image, side)
        code = layers.range_proj(guidance)
        seen = F.unfold(F.pad(code, (3,) * 4, mode="reflect"), 7).unflatten(1, (-1, 49)).unflatten(3, side)
        similar = (seen * code[:, :, None]).sum(1) * layers.range_temp.exp().clamp(1e-4, 1e4)
        axis = torch.linspace(-1, 1, 7)
        spatial = (-(axis.square()[:, None] + axis.square()) / (2 * layers.sigma_spatial.square())).exp().flatten()
        filters = similar.softmax(1) * spatial[:, None, None]
        filters = filters / filters.sum(1, keepdim=True).clamp(min=1e-7)
        filters = filters + 0.1 * layers.fixup_proj(torch.cat([filters, guidance], 1))
        source = F.interpolate(features, side, mode="bicubic")
        source, rows = F.pad(source, (3,) * 4, mode="reflect"), []
        for top in range(0, side[0], chunk):
            part = filters[:, :, top : top + chunk]
            patches = F.unfold(source[:, :, top : top + part.shape[2] + 6], 7).unflatten(1, (-1, 49))
            rows.append((patches * part.flatten(2)[:, None]).sum(2).unflatten(2, part.shape[2:]))
        features = torch.cat(rows, 2)
    features = features + 0.1 * model.upsampler.fixup_proj(features)
    return features if tuple(features.shape[2:]) == size else F.interpolate(features, size, mode="bilinear")


def fourier(model: nn.Module, size: Size, colours: Tensor | None = None) -> Tensor:
    _, channels, number = model.biases.shape
    rows, cols = (torch.from_numpy(core.coordinates(n)) for n in size)
    maps = torch.stack(torch.meshgrid(rows, cols, indexing="ij"))[None]
    if colours is not None:
        maps = torch.cat([maps.expand(len(colours), -1, -1, -1), colours], 1)
    phases = (maps[:, None] * torch.from_numpy(core.frequencies(number))[:, None, None, None]).flatten(1, 2)
    sin, cos = model.biases.reshape(2, number * channels, 1, 1)
    return torch.cat([(phases + sin).sin(), (phases + cos).cos(), *([] if colours is None else [colours])], 1)


def loftup(model: LoftUp, image: Tensor, features: Tensor, size: Size, chunk: int) -> Tensor:
    network, image = model.upsampler, F.interpolate(image, size, mode="bilinear")
    low, high = (bound((0, 2, 3), keepdim=True) for bound in (image.amin, image.amax))
    image = (image - low) / (high - low).clamp(min=1e-4) - 0.5
    code = fourier(network.lr_pe, features.shape[2:]).expand(len(features), -1, -1, -1)
    cells = torch.cat([model.channelnorm(features), code], 1).flatten(2).transpose(1, 2)
    x = network.first_conv(fourier(network.fourier_feat["1"], size, image)).flatten(2).transpose(1, 2)
    for attend, feed in network.ca_transformer.layers:
        query, key = attend.norm_q(x), attend.norm_kv(cells)
        parts = (attend.attention(part, key, key, need_weights=False)[0] for part in query.split(chunk, 1))
        x = x + torch.cat(list(parts), 1)
        x = x + feed(x)
    x = network.ca_transformer.norm(x).transpose(1, 2).unflatten(2, size)
    conv, norm = network.final_conv
    return norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def naf(model: NAF, image: Tensor, features: Tensor, size: Size, chunk: int) -> Tensor:
    encoder, reduced = model.image_encoder, model.config.reduced(tuple(image.shape[2:]), size)
    image = image if reduced == tuple(image.shape[2:]) else F.interpolate(image, reduced, mode="bilinear")

    def encode(layers: nn.Sequential) -> Tensor:
        x = reflect_conv(image, layers[0])
        for part in list(layers)[1:]:
            x = block(x, part)
        return x

    x = F.adaptive_avg_pool2d(torch.cat([encode(encoder.encoder), encode(encoder.sem_encoder)], 1), size)
    places = [(torch.arange(n) + 0.5) / n * 2 - 1 for n in size]
    rows, cols = (2 * np.pi * place[:, None] / encoder.rope.periods for place in places)
    angle = torch.cat([rows[:, None].expand(*size, -1), cols.expand(*size, -1)] * 2, -1).permute(2, 0, 1)
    x = x.unflatten(1, (model.config.rope_heads, -1))
    first, second = x.chunk(2, 2)
    query = (x * angle.cos() + torch.cat([-second, first], 2) * angle.sin()).flatten(1, 2)
    key = F.adaptive_avg_pool2d(query, features.shape[2:])

    def cells(n: int, m: int) -> Tensor:
        """Return the 9 cells that each position sees along an axis."""
        dilation, i = n // m, torch.arange(n)
        place, phase = i // dilation, i % dilation
        count = (n - phase + dilation - 1) // dilation
        start = torch.minimum((place - kernel // 2).clamp(min=0), count - kernel)
        seen = phase[:, None] + dilation * (start[:, None] + torch.arange(kernel))
        return ((seen + 0.5) * (m / n)).floor().long()

    kernel, heads, (height, width) = model.config.kernel_size, model.config.num_heads, features.shape[2:]
    down, across = cells(size[0], height), cells(size[1], width)
    index = (down[:, None, :, None] * width + across[None, :, None]).flatten(0, 1).flatten(1)
    query, key, values = (x.flatten(2).transpose(1, 2).unflatten(2, (heads, -1)) for x in (query, key, features))
    output = values.new_empty(len(values), index.shape[0], *values.shape[2:])  # parts kept one by one leave holes
    for part, seen, out in zip(query.split(chunk, 1), index.split(chunk), output.split(chunk, 1)):
        scores = torch.einsum("bqhd,bqkhd->bqhk", part, key[:, seen]) * part.shape[-1] ** -0.5
        out.copy_(torch.einsum("bqhk,bqkhc->bqhc", scores.softmax(-1), values[:, seen]))
    return output.flatten(2).transpose(1, 2).unflatten(2, size)


PLAIN: dict[str, Callable[..., Tensor]] = {"jafar": jafar, "featup": featup, "loftup": loftup, "naf": naf}
