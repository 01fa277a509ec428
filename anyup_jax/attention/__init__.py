"""Window attention: the public function, its backends by name, and which of them `auto` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from einops import rearrange
from jaxtyping import Array, Float, Int

from anyup_core.checks import check_attention, check_shares
from anyup_core.geometry import AxisWindow
from anyup_jax.attention.automatic import automatic
from anyup_jax.attention.dense import dense
from anyup_jax.attention.pallas_tpu import pallas_tpu
from anyup_jax.attention.tiled import tiled
from anyup_jax.promotion import standard_promotion

BACKENDS = {"dense": dense, "tiled": tiled, "pallas_tpu": pallas_tpu}
PORTABLE = ("dense", "tiled")  # backends that run on every platform


def resolve(backend: str) -> Callable[..., Float[Array, "B Ho Wo E"]]:
    """Return the function of the backend called `backend`; "auto" chooses by the platform of the compiled program.

    Raises:
        ValueError: if there is no such backend.
    """
    functions = {"auto": automatic, **BACKENDS}
    if backend not in functions:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(functions)}.")
    return functions[backend]


@standard_promotion()
def window_attention(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    backend: str = "auto",
    q_chunk_size: int | None = None,
    strip: Int[Array, ""] | None = None,
    values_per_head: bool = False,
) -> Float[Array, "B Ho Wo E"]:
    """Average the values a query's window holds, with attention weights that are averaged over the heads.

    Per head, the weights are softmax(query . key / sqrt(D / num_heads)) over the window; a key that `rows` and `cols`
    count m times enters m times (log m is added to its logit). Every backend gives the same result.

    Args:
        query, key: projected queries and keys, the heads one after the other in the last axis.
        values: what is averaged; any number E of channels.
        rows, cols: the windows along the two axes.
        num_heads: number of heads; divides D.
        backend: a name in `BACKENDS`, or "auto".
        q_chunk_size: number of query positions worked on at once; None lets the backend choose.
        strip: where `query` holds only one of several equal strips of the rows that `rows` describes: which one.
        values_per_head: average no weights: each head averages its own equal share of the value channels, in order.

    Raises:
        ValueError: for an unknown backend, a chunk size below 1, shapes that do not fit the windows, or channels that
            the heads cannot share.
    """
    strips = 1 if strip is None else rows.queries // max(query.shape[1], 1)
    q_chunk_size = check_attention(query, key, values, rows, cols, q_chunk_size, strips)
    options: dict[str, Any] = dict(q_chunk_size=q_chunk_size, strip=0 if strip is None else strip)
    if not values_per_head:
        return resolve(backend)(query, key, values, rows, cols, num_heads=num_heads, **options)
    check_shares(values, num_heads)
    split = [rearrange(x, "b h w (n c) -> (b n) h w c", n=num_heads) for x in (query, key, values)]
    output = resolve(backend)(*split, rows, cols, num_heads=1, **options)  # a head is an image of its own
    return rearrange(output, "(b n) h w c -> b h w (n c)", n=num_heads)
