"""AdamW and NAdam on optax. The state is the count and the two moments, which map to those of PyTorch one to one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from train.config import OptimizerConfig

Moments = optax.ScaleByAdamState
MOMENTUM_DECAY = 0.004  # of NAdam, PyTorch's default


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
    """Return the parameters after a step of AdamW (Loshchilov & Hutter 2019) or NAdam (Dozat 2016), and its state.

    Args:
        config: kind, betas, epsilon, weight decay and clipping.
        rate: learning rate of this step.
        gradients, parameters: trees of the same structure. The update is elementwise, so shards of the arrays will do.
        norm: norm of the whole gradient, for clipping.
        state: count and moments.
    """
    if config.clip_norm is not None:
        factor = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
        if config.clip_steps is not None:
            factor = jnp.where(state.count < config.clip_steps, factor, 1.0)
        gradients = jax.tree.map(lambda x: x * factor, gradients)
    directions, state = optax.scale_by_adam(*config.betas, config.eps).update(gradients, state)
    if config.kind == "nadam":
        directions = nadam(config, gradients, state)
    moved = jax.tree.map(lambda p, d: p - rate * (d + config.weight_decay * p), parameters, directions)
    return moved, state


def nadam(config: OptimizerConfig, gradients: Any, state: Moments) -> Any:
    """Return NAdam's directions as PyTorch has them, given the moments after the step.

    The momentum of step t is beta1 (1 - 0.96 ** (t MOMENTUM_DECAY) / 2), and the bias of the mean that of a product of
    these, which soon is 0: so the products of the first steps are a table, and the state has nothing more than Adam's.
    """
    beta1, beta2 = config.betas
    steps = np.arange(1, 1026)
    momenta = beta1 * (1 - 0.5 * 0.96 ** (steps * MOMENTUM_DECAY))
    products = np.cumprod(momenta)
    t = state.count.astype(jnp.float32)
    momentum, following = (beta1 * (1 - 0.5 * 0.96 ** (step * MOMENTUM_DECAY)) for step in (t, t + 1))
    index = jnp.minimum(state.count, len(steps) - 1)
    product, next_product = (jnp.asarray(products, jnp.float32)[i] for i in (index - 1, index))
    of_gradient, of_mean = (1 - momentum) / (1 - product), following / (1 - next_product)
    bias = 1 - beta2**t

    def direction(g, m, v):
        return (of_gradient * g + of_mean * m) / (jnp.sqrt(v / bias) + config.eps)

    return jax.tree.map(direction, gradients, state.mu, state.nu)


def average(decay: float, averages: Any, parameters: Any, count: Int[Array, ""]) -> Any:
    """Return the moving average after step n = `count`; its decay is min(decay, (1 + n) / (10 + n))."""
    decay = jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda a, p: a * decay + p * (1 - decay), averages, parameters)
