"""Window attention: the public function, its backends by name, and which of them `auto` takes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from anyup_core.checks import check_attention, check_shares
from anyup_core.geometry import AxisWindow
from anyup_torch.attention.dense import dense
from anyup_torch.attention.exported import exported
from anyup_torch.attention.natten import natten, require
from anyup_torch.attention.tiled import tiled
from anyup_torch.attention.triton import available, triton

BACKENDS = {"dense": dense, "tiled": tiled, "triton": triton, "natten": natten}
PORTABLE = ("dense", "tiled")  # backends that run on every platform


def resolve(backend: str, device: torch.device | None = None) -> str:
    """Return the backend that `backend` stands for: itself, or for "auto" the best one on a device.

    That is `triton` on a CUDA device with Triton installed, and `tiled` elsewhere.

    Raises:
        ValueError: if there is no such backend.
    """
    if backend == "auto":
        return "triton" if device is not None and available(device) else "tiled"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}.")
    return backend


def check_backend(backend: str, window: str) -> None:
    """Refuse, before any work, a backend that cannot compute a window here.

    Raises:
        ValueError: if there is no such backend, or if it does not compute the window.
        ImportError: if it needs a package that is not installed.
    """
    if resolve(backend) == "natten":
        if window != "natten":
            raise ValueError(
                f'backend="natten" computes window="natten" only, got window={window!r}; use backend="auto", or '
                'window="natten", which gives another output.'
            )
        require()


@torch.compiler.disable  # tables made by numpy, and a loop over tiles that tracing would unroll
def window_attention(
    query: Float[Tensor, "B Ho Wo D"],
    key: Float[Tensor, "B h w D"],
    values: Float[Tensor, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    backend: str = "auto",
    q_chunk_size: int | None = None,
    values_per_head: bool = False,
) -> Float[Tensor, "B Ho Wo E"]:
    """Average the values a query's window holds, with attention weights that are averaged over the heads.

    Channels come last here, as inside the attention they do in both frameworks. Per head, the weights are
    softmax(query . key / sqrt(D / num_heads)) over the window; a key that `rows` and `cols` count m times enters m
    times (log m is added to its logit). Every backend gives the same result. In `torch.export` a formulation for any
    number of images takes the place of all of them.

    Args:
        query, key: projected queries and keys, the heads one after the other in the last axis.
        values: what is averaged; any number E of channels.
        rows, cols: the windows along the two axes.
        num_heads: number of heads; divides D.
        backend: a name in `BACKENDS`, or "auto".
        q_chunk_size: number of query positions worked on at once; None lets the backend choose.
        values_per_head: each head averages its own share of the value channels, with its own weights; the shares come
            one after the other, as in ordinary attention.

    Raises:
        ValueError: for an unknown backend, a chunk size below 1, shapes that do not fit the windows, or value channels
            that cannot be shared among the heads.
    """
    q_chunk_size = check_attention(query, key, values, rows, cols, q_chunk_size)
    attend = exported if torch.compiler.is_exporting() else BACKENDS[resolve(backend, query.device)]
    if not values_per_head:
        return attend(query, key, values, rows, cols, num_heads=num_heads, q_chunk_size=q_chunk_size)
    check_shares(values, num_heads)
    # as many attentions with one head: the heads become part of the batch
    heads = (x.unflatten(-1, (num_heads, -1)).movedim(-2, 1).flatten(0, 1) for x in (query, key, values))
    output = attend(*heads, rows, cols, num_heads=1, q_chunk_size=q_chunk_size)
    return output.unflatten(0, (-1, num_heads)).movedim(1, -2).flatten(-2)
