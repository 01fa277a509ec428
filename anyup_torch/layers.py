"""The layers of AnyUp in PyTorch, NCHW, in the order of `anyup_jax/layers.py`; state-dict keys are the published ones.

These modules are the plain definition: what autograd and `torch.compile` work on. `streaming.py` computes the same in
eager inference with a fraction of the memory.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyup_core import geometry
from anyup_core.config import NORM_GROUPS
from anyup_torch import threads

GROUP_NORM_EPS = 1e-5
RMS_NORM_EPS = float(np.finfo(np.float32).eps)


def transformed(*tensors: Tensor) -> bool:
    """Whether `torch.func` differentiates or batches one of these; it knows no hooks and no writing into parts."""
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))


class ReflectConv2d(nn.Conv2d):
    """k x k convolution over reflected borders, without bias by default; unlike PyTorch's, for sides of any length."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, bias: bool = False):
        super().__init__(inputs, outputs, kernel_size, bias=bias)

    def forward(self, x: Float[Tensor, "B inputs H W"]) -> Float[Tensor, "B outputs H W"]:
        return super().forward(self.pad(x))

    def pad(self, x: Float[Tensor, "B inputs H W"]) -> Float[Tensor, "B inputs Hp Wp"]:
        half = self.kernel_size[0] // 2
        if half and not torch.compiler.is_compiling() and min(map(int, x.shape[2:])) > half:
            return F.pad(x, (half,) * 4, mode="reflect")  # much faster, but not for sides as short as the border
        for axis, kernel in zip((2, 3), self.kernel_size):
            if kernel > 1:
                x = x.index_select(axis, _reflection(x.shape[axis], kernel // 2, x.device))
        return x


@torch.compiler.disable  # tables are made by numpy, not traced
def _reflection(size: int, border: int, device: torch.device) -> Int[Tensor, " n"]:
    return torch.from_numpy(geometry.reflection(int(size), border)).to(device)


class ResBlock(nn.Module):
    """`conv(SiLU(GN(conv(SiLU(GN(x))))))` plus the shortcut, both convolutions 1 x 1."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, inputs, GROUP_NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.GroupNorm(NORM_GROUPS, outputs, GROUP_NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 1, bias=False),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    norm1, conv1, norm2, conv2 = (property(lambda self, index=index: self.block[index]) for index in (0, 2, 3, 5))

    def forward(self, x: Float[Tensor, "B inputs H W"]) -> Float[Tensor, "B outputs H W"]:
        return self.block(x) + self.shortcut(x)


class ConvEncoder(nn.Sequential):
    """A k x k convolution with reflected borders and two ResBlocks."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1):
        super().__init__(
            ReflectConv2d(inputs, outputs, kernel_size), ResBlock(outputs, outputs), ResBlock(outputs, outputs)
        )


class FeatureUnification(nn.Module):
    """Describes features of any number of channels by how strongly, on average, they answer to M filters.

    Every channel is correlated with every filter (zero padding, divided by the taps inside the image), a softmax picks
    among the filters, and the picks are averaged over the channels.

    The published layer writes its responses channel by channel (entry c M + m of a buffer) but reads the same buffer as
    if filter by filter (entry m' C + c'). The released weights were trained that way, so it is kept: the softmax runs
    over m' for a fixed c', and the layer is not invariant to the order of the channels.
    """

    def __init__(self, filters: int, kernel_size: int, init_gaussian_derivatives: bool):
        super().__init__()
        if init_gaussian_derivatives:
            basis = torch.from_numpy(geometry.gaussian_derivatives(filters, kernel_size))[:, None]
        else:
            basis = torch.randn(filters, 1, kernel_size, kernel_size)
        self.basis = nn.Parameter(basis)

    @torch.compiler.disable  # a loop over blocks, which tracing would unroll
    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B M h w"]:
        if torch.compiler.is_exporting():
            return self._exported(features)
        filters, _, kernel, _ = map(int, self.basis.shape)  # `torch.jit.trace` has tensors as sizes
        batch, channels, height, width = map(int, features.shape)
        positions, half = batch * height * width, kernel // 2
        padded = F.pad(features, (half, half, half, half)).permute(0, 2, 3, 1).contiguous()
        rows, cols = (geometry.taps_in_bounds(size, kernel) for size in (height, width))
        shares = torch.from_numpy(1 / np.outer(rows, cols)).to(features).flatten()
        taps = self.basis.reshape(filters, -1).t()
        offset = torch.arange(kernel, device=features.device)

        def describe(index: Tensor) -> Tensor:  # positions of the flattened batch x height x width
            b, i, j = index // (height * width), index // width % height, index % width
            patch = padded[b[:, None, None], i[:, None, None] + offset[:, None], j[:, None, None] + offset]
            patch = patch.flatten(1, 2) * shares[index % (height * width), None, None]
            response = torch.bmm(patch.transpose(1, 2), taps.expand(len(index), -1, -1)).float()
            misread = response.reshape(-1, filters, channels)  # written (C, M), read (M, C): the quirk
            return misread.softmax(1).mean(2)

        block = UNIFICATION_BLOCK if features.device.type == "cpu" else UNIFICATION_BLOCK_PARALLEL
        step = max(1, block // (channels * filters))
        blocks = torch.arange(positions, device=features.device).split(step)
        if transformed(self.basis, features):
            unified = torch.cat([describe(index) for index in blocks])
        elif torch.is_grad_enabled() and (self.basis.requires_grad or features.requires_grad):
            unified = torch.cat([checkpoint(describe, index, use_reentrant=False) for index in blocks])
        else:  # results that are kept one by one between large blocks that are freed leave holes in the heap
            unified = features.new_empty(positions, filters, dtype=torch.float32)
            results = unified.split(step)
            threads.each(lambda number: results[number].copy_(describe(blocks[number])), len(blocks))
        return unified.to(features.dtype).reshape(batch, height, width, filters).permute(0, 3, 1, 2)

    def _exported(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B M h w"]:
        """Compute the same for any number of images and channels, in at most `EXPORTED_STRIPS` strips of rows."""
        (filters, _, kernel, _), (channels, height, width) = self.basis.shape, features.shape[1:]
        rows, cols = (geometry.taps_in_bounds(size, kernel) for size in (height, width))
        shares = torch.from_numpy(1 / np.outer(rows, cols)).to(features)
        padded, taps = F.pad(features, (kernel // 2,) * 4).permute(0, 2, 3, 1), self.basis.reshape(filters, -1).t()
        step, strips = -(-height // EXPORTED_STRIPS), []
        for begin in range(0, height, step):
            end = min(begin + step, height)
            patch = padded[:, begin : end + kernel - 1].unfold(1, kernel, 1).unfold(2, kernel, 1).flatten(4)
            response = (patch * shares[begin:end, :, None, None] @ taps).float()
            misread = response.flatten(3).unflatten(3, (filters, channels))  # written (C, M), read (M, C): the quirk
            strips.append(misread.softmax(3).mean(4))
        return torch.cat(strips, 1).to(features.dtype).permute(0, 3, 1, 2)


EXPORTED_STRIPS = 8  # strips of rows that the feature unification works on one by one in programs of `torch.export`
UNIFICATION_BLOCK = 1 << 19  # responses held at once by the feature unification: what stays in the cache
UNIFICATION_BLOCK_PARALLEL = 1 << 22  # the same on accelerators, which want few large operations


class RoPE(nn.Module):
    """Rotates every pixel's channels by angles that are linear in its coordinates, with trained frequencies."""

    def __init__(self, dim: int):
        super().__init__()
        self.freqs = nn.Parameter(torch.from_numpy(geometry.rope_frequencies(dim)))

    def forward(
        self, x: Float[Tensor, "B D H W"] | Float[Tensor, "B N D"], coords: Float[Tensor, "... N 2"] | None = None
    ) -> Float[Tensor, "B D H W"] | Float[Tensor, "B N D"]:
        """Rotate an image; or, as the published layer does, positions (B, N, D) whose coordinates are given."""
        if coords is not None:
            angle, axis = coords.float() @ self.freqs.float(), -1
        else:
            row, col = self.angles(*x.shape[2:])
            angle, axis = row.t()[:, :, None] + col.t()[:, None], 1
        first, second = x.float().chunk(2, axis)
        return (x * angle.cos() + torch.cat([-second, first], axis) * angle.sin()).to(x.dtype)

    @torch.compiler.disable  # coordinates are made by numpy, not traced
    def angles(self, height: int, width: int) -> tuple[Float[Tensor, "H D"], Float[Tensor, "W D"]]:
        """Return the rows' and the columns' parts of the angles, float32; a pixel's angle is their sum."""
        axes = (torch.from_numpy(axis).to(self.freqs.device) for axis in geometry.coordinates(int(height), int(width)))
        row, col = (axis[:, None] * freqs for axis, freqs in zip(axes, self.freqs.float()))
        return row, col


class RMSNorm(nn.Module):
    """Division by the root mean square over the channels, then a scale."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "... channels"]) -> Float[Tensor, "... channels"]:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), RMS_NORM_EPS).to(x.dtype)
