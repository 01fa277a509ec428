"""The learning rate of a probe by step: the published schedules, one of which is a published mistake."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from anyup_core.settings import require
from evaluation.config import ProbeConfig

FLOOR = 0.01  # of the peak: where the warm-up begins and the cosine after it ends

Schedule = Callable[[ArrayLike], Float[Array, ""]]


def schedule(config: ProbeConfig, steps_per_epoch: int) -> Schedule:
    """Return the learning rate as a function of the number of finished steps; optax can trace it.

    With the peak p, E epochs of n steps, and s finished steps, that is e = floor(s / n) finished epochs:

    - "constant": p.
    - "cosine_per_epoch": p (1 + cos(pi e / E)) / 2, PyTorch's `CosineAnnealingLR(T_max=E)` stepped once an epoch.
    - "cosine_per_iteration": p (1 + cos(pi s / (E n))) / 2, the same with `T_max=E n`, stepped every iteration.
    - "warmup_cosine": with w = `warmup_epochs` n, p (0.99 s / w + 0.01) up to s = w, then
      p (0.99 cos(pi / 2 (s - w) / (E n - w)) + 0.01) (Probe3D's `cosine_decay_linear_warmup`).
    - "per_iteration_bug": p (1 + cos(pi s / E)) / 2, `CosineAnnealingLR(T_max=E)` stepped every iteration: the rate
      falls to 0 and returns to the peak every 2 E iterations.

    After the last epoch the rate stays constant, except for the last schedule, which goes on as before.

    Args:
        config: schedule, learning rate and epochs.
        steps_per_epoch: optimizer steps of an epoch.

    Raises:
        ValueError: for no steps, or for a warm-up that takes all epochs.
    """
    require(steps_per_epoch >= 1, "steps_per_epoch", steps_per_epoch, "an epoch needs at least one batch")
    epochs, total, warmup = config.epochs, config.epochs * steps_per_epoch, config.warmup_epochs * steps_per_epoch
    if config.schedule == "warmup_cosine":
        require(warmup < total, "probe.warmup_epochs", config.warmup_epochs, f"give less than probe.epochs={epochs}")
    factor = {
        "constant": lambda step: jnp.ones(()),
        "cosine_per_epoch": lambda step: _half_cosine(step // steps_per_epoch, epochs),
        "cosine_per_iteration": lambda step: _half_cosine(step, total),
        "warmup_cosine": functools.partial(_warmup_cosine, warmup=warmup, total=total),
        "per_iteration_bug": lambda step: _oscillation(step, epochs),
    }[config.schedule]
    return lambda step: config.learning_rate * factor(jnp.asarray(step))


def _half_cosine(done: Array, of: int) -> Float[Array, ""]:
    return (1 + jnp.cos(jnp.pi * jnp.minimum(done / of, 1))) / 2


def _oscillation(step: Array, half_period: int) -> Float[Array, ""]:
    return (1 + jnp.cos(jnp.pi * (step % (2 * half_period)) / half_period)) / 2


def _warmup_cosine(step: Array, *, warmup: float, total: int) -> Float[Array, ""]:
    rise = step / max(warmup, 1)  # 1 avoids a division by 0; without a warm-up `rise` is not used
    fall = jnp.cos(jnp.pi / 2 * jnp.clip((step - warmup) / (total - warmup), 0, 1))
    return (1 - FLOOR) * jnp.where(step < warmup, rise, fall) + FLOOR
