"""The backend `auto`: the fused kernels in programs for a TPU, tiles of plain operations in all others."""

from __future__ import annotations

import functools

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from anyup_core.geometry import AxisWindow
from anyup_jax.attention.pallas_tpu import attend, kernel_tables
from anyup_jax.attention.tiled import attend_tiles, tile_tables


def automatic(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
    strip: Int[Array, ""] | int = 0,
) -> Float[Array, "B Ho Wo E"]:
    """Compute `window_attention` with `pallas_tpu` where the program is lowered for a TPU and the keys fit, or `tiled`.

    The platform is that of the program, not of the host that traces it: a program compiled on a CPU host for a TPU has
    the kernels. A program has one of the two, never both.
    """
    tiles = tile_tables(query, rows, cols, q_chunk_size, strip)
    kernels = kernel_tables(query, key, values, rows, cols, num_heads, q_chunk_size, strip)
    if kernels is None:
        return attend_tiles(query, key, values, *tiles, num_heads)
    return _automatic(query, key, values, tiles, kernels, num_heads)


def _on_tpu(query, key, values, tiles, kernels, num_heads):
    return attend(query, key, values, kernels, num_heads=num_heads)


def _elsewhere(query, key, values, tiles, kernels, num_heads):
    return attend_tiles(query, key, values, *tiles, num_heads)


BY_PLATFORM = dict(tpu=_on_tpu, default=_elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _automatic(query, key, values, tiles, kernels, num_heads):
    chosen = {platform: functools.partial(attend, num_heads=num_heads) for platform, attend in BY_PLATFORM.items()}
    return lax.platform_dependent(query, key, values, tiles, kernels, **chosen)


def _forward(query, key, values, tiles, kernels, num_heads):
    return _automatic(query, key, values, tiles, kernels, num_heads), (query, key, values, tiles, kernels)


def _backward(num_heads, saved, cotangent):
    def pull(attend):
        def gradient(query, key, values, tiles, kernels, cotangent):
            return jax.vjp(lambda *x: attend(*x, tiles, kernels, num_heads), query, key, values)[1](cotangent)

        return gradient

    pulls = {platform: pull(attend) for platform, attend in BY_PLATFORM.items()}
    return *lax.platform_dependent(*saved, cotangent, **pulls), None, None


_automatic.defvjp(_forward, _backward)
