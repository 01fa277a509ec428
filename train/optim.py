"""AdamW on optax. Its state is only the count and the two moments, which map to those of PyTorch one to one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from train.config import OptimizerConfig

Moments = optax.ScaleByAdamState


def schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """Return the learning rate by step: a linear warm-up, then constant or a cosine to `final_learning_rate`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    after = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max_steps - warmup, config.final_learning_rate / peak)
    if not warmup:
        return after
    # step 0 has a rate above 0, and the rate reaches its peak at the step after the warm-up
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def init(config: OptimizerConfig, parameters: Any) -> Moments:
    """Return the state before the first step."""
    return optax.scale_by_adam(*config.betas, config.eps).init(parameters)


def update(
    config: OptimizerConfig,
    rate: float | Float[Array, ""],
    gradients: Any,
    norm: Float[Array, ""],
    state: Moments,
    parameters: Any,
) -> tuple[Any, Moments]:
    """Return the parameters after a step of AdamW (Loshchilov & Hutter 2019), and its state.

    Args:
        config: betas, epsilon, weight decay and clipping.
        rate: learning rate of this step.
        gradients, parameters: trees of the same structure. The update is elementwise, so shards of the arrays will do.
        norm: norm of the whole gradient, for clipping.
        state: count and moments.
    """
    if config.clip_norm is not None:
        factor = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
        gradients = jax.tree.map(lambda x: x * factor, gradients)
    directions, state = optax.scale_by_adam(*config.betas, config.eps).update(gradients, state)
    moved = jax.tree.map(lambda p, d: p - rate * (d + config.weight_decay * p), parameters, directions)
    return moved, state


def average(decay: float, averages: Any, parameters: Any, count: Int[Array, ""]) -> Any:
    """Return the moving average after step n = `count`; its decay is min(decay, (1 + n) / (10 + n))."""
    decay = jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda a, p: a * decay + p * (1 - decay), averages, parameters)
