"""How close upsampled features are to those of the encoder; no labels are needed.

Two cosine similarities, averaged over positions and images: between features upsampled by a whole factor and the
features of the image enlarged by that factor, and between features upsampled to the image's size, then averaged over
cells again, and the features themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from anyup_core.encoders.frozen import FrozenEncoder
from anyup_jax.pooling import adaptive_average_pool
from evaluation.frozen import encode
from evaluation.methods import Method


def cosine(a: Float[Array, "... C"], b: Float[Array, "... C"]) -> Float[Array, "..."]:
    """Return the cosine similarity along the last axis; 0 where either vector is 0."""
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / jnp.maximum(norms, 1e-12)


def scores(
    encoder: FrozenEncoder, method: Method, images: Iterable[UInt8[np.ndarray, "H W 3"]], factor: int
) -> dict[str, float]:
    """Return `cosine_high` and `cosine_down`.

    Args:
        encoder: computes the features.
        method: upsamples them.
        images: 8-bit RGB.
        factor: how many times larger the image is whose features `cosine_high` compares with.
    """

    @jax.jit
    def compare(image, low, high):
        at_high = method(image, low, high.shape[1:3])
        down = adaptive_average_pool(method(image, low, image.shape[1:3]), low.shape[1:3])
        return cosine(at_high, high).mean(), cosine(down, low).mean()

    cosines = []
    for image in images:
        low, high = encode(encoder, image[None]), encode(encoder, image[None], factor)
        cosines.append(compare(jnp.asarray(image[None], jnp.float32) / 255, low, high))
    return dict(zip(("cosine_high", "cosine_down"), np.mean(jax.device_get(cosines), axis=0).tolist()))
