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

    def forward(self, query, key, values, rows, cols, *, backend, q_chunk_size) -> Float[Tensor, "B E Ho Wo"]:
        projections, batch, (height, width) = self.cross_attn, len(query), query.shape[2:]
        query = projections.norm_q(self.conv2d(query).flatten(2).transpose(1, 2))
        key = projections.norm_k(key.flatten(2).transpose(1, 2))
        flat = values.flatten(2).transpose(1, 2)
        seen_rows, seen_cols = (torch.from_numpy(axis.dense()) > 0 for axis in (rows, cols))
        chunks = []
        for index in torch.arange(height * width).split(q_chunk_size or height * width):
            unseen = ~(seen_rows[index // width][:, :, None] & seen_cols[index % width][:, None]).flatten(1)
            _, weights = projections.attention(query[:, index], key, key, attn_mask=unseen, average_attn_weights=True)
            chunks.append(weights @ flat)
        return torch.cat(chunks, 1).transpose(1, 2).reshape(batch, -1, height, width)


def with_published_attention(model: AnyUp) -> AnyUp:
    """Return the model, its backend "dense" replaced by the published algorithm (paper windows only)."""
    model.cross_decode.__class__ = PublishedAttention
    return model
