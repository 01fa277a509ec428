"""Fitting a head to frozen features: epochs of AdamW whose state is written after each, so that it can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import safe_open
from safetensors.numpy import save_file

from anyup_core.files import replacing
from evaluation.config import ProbeConfig
from evaluation.prefetch import ahead
from evaluation.schedules import schedule

Told = Callable[[int, float], None]  # an epoch and its mean loss
Chosen = tuple[list[int], bool]


def epoch_order(count: int, probe: ProbeConfig, seed: int, epoch: int) -> Iterator[Chosen]:
    """Yield the images of every batch of an epoch, and whether the batch is mirrored; the last one may be smaller."""
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(count)
    for start in range(0, count, probe.batch_size):
        yield order[start : start + probe.batch_size].tolist(), probe.flip and bool(random.random() < 0.5)


def fit(
    head: Any,
    loss: Callable[[Any, Any], Any],
    read: Callable[[Any], Any],
    order: Callable[[int], Iterable[Any]],
    probe: ProbeConfig,
    count: int,
    saved: Path,
    about: Mapping[str, Any],
    say: Told,
) -> Any:
    """Return the parameters of a head after all epochs.

    Args:
        head: its initial parameters, in dictionaries.
        loss: of parameters and a batch; it is traced once for each shape of a batch.
        read: gives the batch for what `order` yields; called ahead of time by a thread.
        order: what each batch of an epoch consists of.
        probe: learning rate, schedule and epochs.
        count: images of an epoch.
        saved: the file the state is written to after every epoch; training goes on from there if it exists.
        about: all that the head depends on, in terms of JSON.
        say: told the epoch and its mean loss.

    Raises:
        ValueError: if the file is of a head that something else was said of.
    """
    steps = -(-count // probe.batch_size)
    optimizer = optax.adamw(schedule(probe, steps), weight_decay=probe.weight_decay)
    first, state = restore(saved, dict(head=head, optimizer=optimizer.init(head)), about)

    @jax.jit
    def step(state, batch):
        value, gradient = jax.value_and_grad(loss)(state["head"], batch)
        updates, moments = optimizer.update(gradient, state["optimizer"], state["head"])
        return dict(head=optax.apply_updates(state["head"], updates), optimizer=moments), value

    for epoch in range(first, probe.epochs):
        losses = []
        for batch in ahead(read, order(epoch)):
            state, value = step(state, batch)
            losses.append(value)
        mean = float(np.mean(jax.device_get(losses)))
        save(saved, epoch + 1, state, about)
        say(epoch + 1, mean)
    return state["head"]


def save(path: Path, epoch: int, state: Any, about: Mapping[str, Any]) -> None:
    """Write the state after an epoch."""
    leaves, _ = jax.tree.flatten_with_path(state)
    arrays = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(arrays, temporary, {"epoch": str(epoch), "about": json.dumps(about, sort_keys=True)})


def restore(path: Path, state: Any, about: Mapping[str, Any]) -> tuple[int, Any]:
    """Return the epochs that are done and the state after them; the given state if there is no file.

    Raises:
        ValueError: if something else was said of what is in the file.
    """
    if not path.is_file():
        return 0, state
    with safe_open(path, "numpy") as file:
        said = file.metadata()
        if said["about"] != json.dumps(about, sort_keys=True):
            raise ValueError(
                f"{path} is a probe that was trained with other settings; choose another output_dir, or delete it."
            )
        loaded = jax.tree.map_with_path(lambda key, _: jnp.asarray(file.get_tensor(jax.tree_util.keystr(key))), state)
    return int(said["epoch"]), loaded
