"""Losses of the heads for depth and surface normals, as in Probe3D (El Banani et al., 2024).

Every mean is over the valid pixels of the whole batch. If there are none, the losses and their gradients are 0. Other
pixels have no influence, whatever values they have, NaN included.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from evaluation.heads import unit

SHIFT = 1e-3  # metres, added before logarithms
VARIANCE_FOCUS = 0.85
SCALE_INVARIANT_WEIGHT, GRADIENT_WEIGHT = 10.0, 0.5
STRIDES = 1, 2, 4, 6
STEP = 2  # pixels between the two that a gradient compares
COSINE_LIMIT = 1 - 1e-4


def depth_loss(
    prediction: Float[Array, "B H W"], target: Float[Array, "B H W"], valid: Bool[Array, "B H W"]
) -> Float[Array, ""]:
    """Return 10 sqrt(mean(g^2) - 0.85 mean(g)^2) + 0.5 L, with g = log(prediction + 0.001) - log(target + 0.001).

    L is the log-gradient loss (MegaDepth, Li & Snavely, 2018, as DINOv2 has it): of every 1st, 2nd, 4th and 6th row and
    column, the sum of |g(i) - g(i + 2)| along rows and along columns where both are valid, divided by the number of
    valid pixels there. Until November 2025 Probe3D's code took these differences and strides along the axes of batch
    and channels; here they run along rows and columns, as in its correction.

    Args:
        prediction, target: depth in metres, at least 0 where valid.
        valid: pixels that count; in the protocol those with 0 < target <= 10.
    """
    safe = (jnp.where(valid, depth, 1) for depth in (prediction, target))
    predicted, true = (jnp.log(depth + SHIFT) for depth in safe)
    g = predicted - true
    return SCALE_INVARIANT_WEIGHT * _scale_invariant(g, valid) + GRADIENT_WEIGHT * _gradients(g, valid)


def _scale_invariant(g: Float[Array, "B H W"], valid: Bool[Array, "B H W"]) -> Float[Array, ""]:
    square = _mean(jnp.square(g), valid) - VARIANCE_FOCUS * jnp.square(_mean(g, valid))
    positive = square > 0  # the root has no gradient at 0, the value of a perfect prediction
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _gradients(g: Float[Array, "B H W"], valid: Bool[Array, "B H W"]) -> Float[Array, ""]:
    total = jnp.zeros(())
    for stride in STRIDES:
        level, mask = g[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        down = _absolute(level[:, :-STEP] - level[:, STEP:]) * (mask[:, :-STEP] & mask[:, STEP:])
        right = _absolute(level[:, :, :-STEP] - level[:, :, STEP:]) * (mask[:, :, :-STEP] & mask[:, :, STEP:])
        total += (down.sum() + right.sum()) / jnp.maximum(mask.sum(), 1)
    return total


def _absolute(x: Float[Array, ...]) -> Float[Array, ...]:
    return x * jnp.sign(x)  # its gradient at 0 is 0, that of jnp.abs is 1


def normal_loss(
    normals: Float[Array, "B H W 3"],
    kappa: Float[Array, "B H W"],
    target: Float[Array, "B H W 3"],
    valid: Bool[Array, "B H W"],
) -> Float[Array, ""]:
    """Return the mean of ln(1 + exp(-kappa pi)) - ln(kappa^2 + 1) + kappa theta, theta being the angle between normals.

    It is the negative log-likelihood of the angular von Mises-Fisher distribution (Bae et al., 2021) without its
    constant. As in Probe3D the cosine is clipped to +-(1 - 1e-4): within 0.81 degrees of the truth, and of its
    opposite, the loss does not depend on the direction.

    Args:
        normals: of unit length where valid, and `kappa` positive, as `evaluation.heads.normals_of` returns them.
        kappa: concentration.
        target: of any length; the angle to a zero vector counts as 90 degrees.
        valid: pixels that count.
    """
    normals, target = (jnp.where(valid[..., None], x, 0) for x in (normals, target))
    kappa = jnp.where(valid, kappa, 1)
    cosine = (normals * unit(target)).sum(-1)
    angle = jnp.arccos(jnp.clip(cosine, -COSINE_LIMIT, COSINE_LIMIT))
    return _mean(jax.nn.softplus(-kappa * jnp.pi) - jnp.log1p(jnp.square(kappa)) + kappa * angle, valid)


def _mean(x: Float[Array, "B H W"], valid: Bool[Array, "B H W"]) -> Float[Array, ""]:
    return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1)
