"""AdamW on optax, its state only the count and the two moments, so that it maps to PyTorch's one to one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from train.config import OptimizerConfig

Moments = optax.ScaleByAdamState


def schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then constant or a cosine to `final_learning_rate`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    after = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max_steps - warmup, config.final_learning_rate / peak)
    if not warmup:
        return after
    # step 0 already moves: the rate reaches its peak at the step after the warm-up
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def init(config: OptimizerConfig, parameters: Any) -> Moments:
    """Return the state before the first step."""
    return optax.scale_by_adam(*config.betas, config.eps).init(parameters)


def update(
    config: OptimizerConfig,
    rate: Float[Array, ""],
    gradients: Any,
    norm: Float[Array, ""],
    state: Moments,
    parameters: Any,
) -> tuple[Any, Moments]:
    """Return the parameters after a step of AdamW (Loshchilov & Hutter 2019) and the state.

    Args:
        config: betas, epsilon, decay and clipping.
        rate: learning rate of this step.
        gradients, parameters: of the same structure; parts of the arrays will do, as nothing mixes their entries.
        norm: of the whole gradient, which clipping compares with.
        state: the moments.
    """
    if config.clip_norm is not None:
        factor = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
        gradients = jax.tree.map(lambda x: x * factor, gradients)
    directions, state = optax.scale_by_adam(*config.betas, config.eps).update(gradients, state)
    moved = jax.tree.map(lambda p, d: p - rate * (d + config.weight_decay * p), parameters, directions)
    return moved, state


def average(decay: float, averages: Any, parameters: Any, count: Int[Array, ""]) -> Any:
    """Return the moving average after a step; the first steps weigh more, min(decay, (1 + n) / (10 + n))."""
    decay = jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda a, p: a * decay + p * (1 - decay), averages, parameters)
