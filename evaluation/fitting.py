"""Training a head on frozen features with AdamW; the state is written after every epoch, so that training resumes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from anyup_core.files import replacing
from evaluation.config import ProbeConfig
from evaluation.prefetch import prefetch
from evaluation.schedules import schedule

Item, Batch = TypeVar("Item"), TypeVar("Batch")
Parameters = dict[str, Any]  # arrays by name, in nested dictionaries
Report = Callable[[int, float], None]  # takes a finished epoch, counted from 1, and its mean loss
Selection = tuple[list[int], bool]  # the images of a batch, and whether it is mirrored


@dataclasses.dataclass(frozen=True)
class ProbeFile:
    """The file that holds a probe while it is trained and afterwards.

    Attributes:
        path: the file, .safetensors.
        settings: all that the probe depends on, as JSON values. A file written with other settings is refused.
    """

    path: Path
    settings: Mapping[str, Any]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Generic[Item, Batch]):
    """How a head is trained.

    Attributes:
        loss: of the head's parameters and a batch; compiled once for each shape of a batch.
        order: yields the items of an epoch, one for each batch.
        read: makes the batch of an item; a thread calls it one batch in advance.
        images: number of images in an epoch.
        probe: learning rate, schedule, epochs and batch size.
        file: receives the state after every epoch; if it exists, training resumes from it.
        report: called after every epoch.
    """

    loss: Callable[[Parameters, Batch], Float[Array, ""]]
    order: Callable[[int], Iterable[Item]]
    read: Callable[[Item], Batch]
    images: int
    probe: ProbeConfig
    file: ProbeFile
    report: Report


def epoch_order(count: int, probe: ProbeConfig, seed: int, epoch: int) -> Iterator[Selection]:
    """Yield the images of every batch of an epoch, and whether the batch is mirrored; the last one may be smaller."""
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(count)
    for start in range(0, count, probe.batch_size):
        yield order[start : start + probe.batch_size].tolist(), probe.flip and bool(random.random() < 0.5)


def fit(head: Parameters, training: Training) -> Parameters:
    """Return the parameters of a head after all epochs, given its initial ones.

    Raises:
        ValueError: if `training.file` is damaged or was written with other settings.
    """
    probe = training.probe
    steps = -(-training.images // probe.batch_size)
    optimizer = optax.adamw(schedule(probe, steps), weight_decay=probe.weight_decay)
    first, state = training.file.restore(dict(head=head, optimizer=optimizer.init(head)))

    @jax.jit
    def step(state, batch):
        loss, gradient = jax.value_and_grad(training.loss)(state["head"], batch)
        updates, moments = optimizer.update(gradient, state["optimizer"], state["head"])
        return dict(head=optax.apply_updates(state["head"], updates), optimizer=moments), loss

    for epoch in range(first, probe.epochs):
        losses = []
        for batch in prefetch(training.read, training.order(epoch)):
            state, loss = step(state, batch)
            losses.append(loss)
        mean = float(np.mean(jax.device_get(losses)))
        training.file.save(epoch + 1, state)
        training.report(epoch + 1, mean)
    return state["head"]
