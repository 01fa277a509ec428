"""Training a head on frozen features with AdamW; the state is written after every epoch, so that training resumes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from anyup_core.files import replacing
from anyup_core.settings import require
from evaluation.config import Config, ProbeConfig

Item, Value, Batch = TypeVar("Item"), TypeVar("Value"), TypeVar("Batch")
FLOOR = 0.01  # of the peak rate: where the warm-up begins and the cosine after it ends
Parameters = dict[str, Any]  # arrays by name, in nested dictionaries


@dataclasses.dataclass(frozen=True)
class ProbeFile:
    """The file that holds a probe while it is trained and afterwards.

    Attributes:
        path: the file, .safetensors.
        settings: all that the probe depends on, as JSON values. A file written with other settings is refused.
        log: receives a line on every epoch that is trained.
    """

    path: Path
    settings: Mapping[str, Any]
    log: Callable[[str], None] = print

    def save(self, epoch: int, state: Parameters) -> None:
        """Write the state after an epoch."""
        leaves, _ = jax.tree.flatten_with_path(state)
        arrays = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            save_file(arrays, temporary, {"epoch": str(epoch), "settings": json.dumps(self.settings, sort_keys=True)})

    def restore(self, state: Parameters) -> tuple[int, Parameters]:
        """Return the number of finished epochs and the state after them; 0 and `state` itself if there is no file.

        Raises:
            ValueError: if the file is damaged or was written with other settings.
        """
        if not self.path.is_file():
            return 0, state
        try:
            with safe_open(self.path, "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("settings") != json.dumps(self.settings, sort_keys=True):
                    raise ValueError(
                        f"{self.path} holds a probe that was trained with other settings; choose another output_dir, "
                        "or delete it."
                    )
                names = jax.tree.map_with_path(lambda key, _: jax.tree_util.keystr(key), state)
                return int(metadata["epoch"]), jax.tree.map(lambda name: jnp.asarray(file.get_tensor(name)), names)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{self.path} is no probe, or damaged ({error}); delete it.") from error

    def load(self, head: Parameters, epochs: int) -> Parameters:
        """Return the parameters of a probe whose training has ended; `head` has the same structure and shapes.

        Raises:
            FileNotFoundError: if there is no file, or training has not ended.
            ValueError: if the file is damaged or was written with other settings.
        """
        epoch, state = self.restore(dict(head=head))
        if epoch < epochs:
            raise FileNotFoundError(
                f"{self.path} holds no probe after {epochs} epochs, which other methods are scored with; delete the "
                "folder it is in, so that the probe is trained again."
            )
        return state["head"]


def schedule(config: ProbeConfig, steps_per_epoch: int) -> Callable[[ArrayLike], Float[Array, ""]]:
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

    def rate(step: ArrayLike) -> Float[Array, ""]:
        step = jnp.asarray(step)
        if config.schedule == "warmup_cosine":
            rise = step / max(warmup, 1)  # 1 avoids a division by 0; without a warm-up `rise` is not used
            fall = jnp.cos(jnp.pi / 2 * jnp.clip((step - warmup) / (total - warmup), 0, 1))
            return config.learning_rate * ((1 - FLOOR) * jnp.where(step < warmup, rise, fall) + FLOOR)
        angle = {
            "constant": jnp.zeros(()),
            "cosine_per_epoch": jnp.pi * jnp.minimum(step // steps_per_epoch / epochs, 1),
            "cosine_per_iteration": jnp.pi * jnp.minimum(step / total, 1),
            "per_iteration_bug": jnp.pi * (step % (2 * epochs)) / epochs,
        }[config.schedule]
        return config.learning_rate * ((1 + jnp.cos(angle)) / 2)

    return rate


def prefetch(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """Yield the function of every item, in order; a thread computes the next one.

    Raises:
        Exception: what the function raises, where that item's value is due. Closing the iterator stops the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="evaluation") as pool:
        futures = (pool.submit(function, item) for item in items)
        for current, _following in pairwise(chain(futures, [None])):  # the next one is submitted by now
            yield current.result()


def epoch_order(count: int, probe: ProbeConfig, seed: int, epoch: int) -> Iterator[tuple[list[int], bool]]:
    """Yield the images of every batch of an epoch, and whether the batch is mirrored; the last one may be smaller."""
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(count)
    for start in range(0, count, probe.batch_size):
        yield order[start : start + probe.batch_size].tolist(), probe.flip and bool(random.random() < 0.5)


def fit(
    head: Parameters,
    loss: Callable[[Parameters, Batch], Float[Array, ""]],
    read: Callable[[int, list[int], bool], Batch],
    images: int,
    config: Config,
    file: ProbeFile,
) -> Parameters:
    """Return the parameters of a head after all epochs, given its initial ones.

    Args:
        head: the initial parameters.
        loss: of the parameters and a batch, the sum over `probe.repeats` probes; compiled once for each shape of a
            batch.
        read: makes a batch, given the epoch, its images and whether they are mirrored; a thread calls it one batch in
            advance.
        images: number of images in an epoch.
        config: the evaluation: learning rate, schedule, epochs and batch size of the probe, and the seed.
        file: receives the state after every epoch; if it exists, training resumes from it.

    Raises:
        ValueError: if `file` is damaged or was written with other settings.
    """
    probe = config.probe
    optimizer = optax.adamw(schedule(probe, -(-images // probe.batch_size)), weight_decay=probe.weight_decay)
    first, state = file.restore(dict(head=head, optimizer=optimizer.init(head)))

    @jax.jit
    def step(state, batch):
        value, gradient = jax.value_and_grad(loss)(state["head"], batch)
        updates, moments = optimizer.update(gradient, state["optimizer"], state["head"])
        return dict(head=optax.apply_updates(state["head"], updates), optimizer=moments), value

    for epoch in range(first, probe.epochs):
        losses = []
        order = epoch_order(images, probe, config.seed, epoch)
        for batch in prefetch(lambda selection, epoch=epoch: read(epoch, *selection), order):
            state, value = step(state, batch)
            losses.append(value)
        file.save(epoch + 1, state)
        file.log(f"epoch {epoch + 1}, loss {np.mean(jax.device_get(losses)) / probe.repeats:.4f}")
    return state["head"]
