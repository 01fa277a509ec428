"""The published attention algorithm, as the yardstick of speed: `nn.MultiheadAttention` for its weights alone.

Every chunk of queries goes through the whole module under a dense mask; the output it computes is thrown away, and the
weights, averaged over the heads, are multiplied with the raw values. Our `dense` leaves out what is thrown away.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from anyup_torch import AnyUp
from anyup_torch.model import CrossAttention


class PublishedAttention(CrossAttention):
    """`CrossAttention` with the published algorithm; the parameters are the same."""

    def forward(self, query, maps, windows, *, backend, q_chunk_size) -> list[Float[Tensor, "B _ Ho Wo"]]:
        query = self.cross_attn.norm_q(self.conv2d(query).permute(0, 2, 3, 1))
        return [self.average(query, *pair, *window, q_chunk_size) for pair, window in zip(maps, windows)]

    def average(self, query, key, values, rows, cols, q_chunk_size) -> Float[Tensor, "B E Ho Wo"]:
        batch, height, width, _ = query.shape
        query = query.flatten(1, 2)
        key = self.cross_attn.norm_k(key.flatten(2).transpose(1, 2))
        flat = values.flatten(2).transpose(1, 2)
        seen_rows, seen_cols = (torch.from_numpy(axis.dense()) > 0 for axis in (rows, cols))
        chunks = []
        for index in torch.arange(height * width).split(q_chunk_size or height * width):
            unseen = ~(seen_rows[index // width][:, :, None] & seen_cols[index % width][:, None]).flatten(1)
            options = dict(attn_mask=unseen, average_attn_weights=True)
            _, weights = self.cross_attn.attention(query[:, index], key, key, **options)
            chunks.append(weights @ flat)
        return torch.cat(chunks, 1).transpose(1, 2).reshape(batch, -1, height, width)


def with_published_attention(model: AnyUp) -> AnyUp:
    """Return the model, its backend "dense" replaced by the published algorithm (paper windows only)."""
    model.cross_decode.__class__ = PublishedAttention
    return model
