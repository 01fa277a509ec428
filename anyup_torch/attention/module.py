"""The published way: the attention weights of an `nn.MultiheadAttention`, called as a module under a dense mask.

For modules that are hooked or replaced; what they return beside the weights is thrown away. Memory is quadratic.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core.geometry import AxisWindow

CHUNK = 1024  # queries at once where `q_chunk_size` is None


def call_module(
    attention: nn.Module,
    query: Float[Tensor, "B Ho Wo D"],
    key: Float[Tensor, "B h w D"],
    values: Float[Tensor, "B h w E"],
    window: tuple[AxisWindow, AxisWindow],
    *,
    q_chunk_size: int | None,
) -> Float[Tensor, "B Ho Wo E"]:
    """Average the values with the weights that a module returns for queries and keys before their projection."""
    shape, flat = query.shape[:3], values.flatten(1, 2)
    query, key = query.flatten(1, 2), key.flatten(1, 2)
    rows, cols = (torch.from_numpy(axis.dense()).to(query).log() for axis in window)  # log 0: never seen
    chunks = []
    for index in torch.arange(query.shape[1], device=query.device).split(q_chunk_size or CHUNK):
        bias = (rows[index // shape[2]][:, :, None] + cols[index % shape[2]][:, None]).flatten(1)
        options = dict(attn_mask=bias, need_weights=True, average_attn_weights=True)
        _, weights = attention(query[:, index], key, key, **options)
        chunks.append(weights.to(flat.dtype) @ flat)
    return torch.cat(chunks, 1).unflatten(1, shape[1:])
