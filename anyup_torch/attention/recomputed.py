"""Gradients for kernels that compute an output only: those of `tiled`, with nothing stored but the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anyup_torch.attention.tiled import tiled


class Recomputed(torch.autograd.Function):
    """`forward(query, key, values, rows, cols, num_heads, q_chunk_size)`, with the gradients of `tiled`."""

    @staticmethod
    def forward(ctx, forward: Callable[..., Tensor], query: Tensor, key: Tensor, values: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(query, key, values)
        ctx.rest = rest
        return forward(query, key, values, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, cols, num_heads, q_chunk_size = ctx.rest
        needed = ctx.needs_input_grad[1:4]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
            out = tiled(*inputs, rows, cols, num_heads=num_heads, q_chunk_size=q_chunk_size)
            grads = iter(torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grad))
        return None, *(next(grads) if need else None for need in needed), *(None for _ in ctx.rest)
