"""Attention of every query with every key under a mask: the definition, for small sizes and for checking the others."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from anyup_core.geometry import AxisWindow


def dense(
    query: Float[Tensor, "B Ho Wo D"],
    key: Float[Tensor, "B h w D"],
    values: Float[Tensor, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
) -> Float[Tensor, "B Ho Wo E"]:
    """Compute `window_attention` with all Ho Wo x h w scores, in chunks of `q_chunk_size` queries if given."""
    batch, height, width, dim = query.shape
    heads = query.reshape(batch, -1, num_heads, dim // num_heads).transpose(1, 2)
    keys = key.reshape(batch, -1, num_heads, dim // num_heads).permute(0, 2, 3, 1)
    flat = values.reshape(batch, -1, values.shape[-1])
    row_bias, col_bias = (torch.from_numpy(axis.dense()).to(query.device).float().log() for axis in (rows, cols))
    chunks = []
    for index in torch.arange(height * width, device=query.device).split(q_chunk_size or height * width):
        bias = row_bias[index // width][:, :, None] + col_bias[index % width][:, None]
        scores = (heads[:, :, index] * (dim // num_heads) ** -0.5 @ keys).float() + bias.flatten(1)
        chunks.append(scores.softmax(-1).mean(1).to(flat.dtype) @ flat)
    return torch.cat(chunks, 1).reshape(batch, height, width, -1)
