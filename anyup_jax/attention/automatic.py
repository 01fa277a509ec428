"""The backend `auto`: the fused kernels in programs for a TPU, tiles of plain operations in all others."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from anyup_core.geometry import AxisWindow
from anyup_jax.attention.pallas_tpu import pallas_tpu, plan_tables
from anyup_jax.attention.tiled import tiled


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
    options = Options(rows, cols, num_heads, q_chunk_size)
    if not options.fit(query, key, values):
        return tiled(query, key, values, rows, cols, num_heads=num_heads, q_chunk_size=q_chunk_size, strip=strip)
    return _automatic(query, key, values, strip, options)


class Options:
    """What the two backends need besides arrays."""

    def __init__(self, rows: AxisWindow, cols: AxisWindow, num_heads: int, q_chunk_size: int | None):
        self.windows = rows, cols
        self.named = dict(num_heads=num_heads, q_chunk_size=q_chunk_size)

    def fit(self, query: Array, key: Array, values: Array) -> bool:
        """Whether the kernels can hold the keys of a tile."""
        size = max(x.dtype.itemsize for x in (query, key, values))
        strips = self.windows[0].queries // query.shape[1]
        channels = query.shape[-1], values.shape[-1]
        try:
            plan_tables(*self.windows, *channels, self.named["num_heads"], size, self.named["q_chunk_size"], strips)
        except ValueError:
            return False
        return True

    def backends(self) -> dict[str, Callable[..., Array]]:
        def attend(backend):
            return lambda query, key, values, strip: backend(
                query, key, values, *self.windows, strip=strip, **self.named
            )

        return dict(tpu=attend(pallas_tpu), default=attend(tiled))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _automatic(query, key, values, strip, options):
    return lax.platform_dependent(query, key, values, strip, **options.backends())


def _forward(query, key, values, strip, options):
    return _automatic(query, key, values, strip, options), (query, key, values, strip)


def _backward(options, saved, cotangent):
    def pull(attend):
        def gradient(query, key, values, strip, cotangent):
            return jax.vjp(lambda *x: attend(*x, strip), query, key, values)[1](cotangent)

        return gradient

    pulls = {platform: pull(attend) for platform, attend in options.backends().items()}
    return *lax.platform_dependent(*saved, cotangent, **pulls), None


_automatic.defvjp(_forward, _backward)
