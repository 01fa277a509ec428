"""The weights of an upsampler: found in what was saved, checked, and mapped from PyTorch to Flax and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from anyup_core.checkpoints.checkpoint import by_name, faults, listed, to_flax, to_torch
from anyup_core.encoders.rows import Row
from anyup_core.upsamplers import catalogue
from anyup_core.upsamplers.config import UpsamplerConfig

KEY = "upsampler"  # in what a file carries beside the weights, with the name of the method
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every key


class UpsamplerCheckpoint:
    """The weights of one upsampler, complete and of the right shapes.

    Args:
        method: its name.
        tensors: PyTorch key -> array in PyTorch's layout; of a training checkpoint, more than the upsampler's.
        settings: of the model, that the weights do not tell, or tell alike.

    Attributes:
        method: the same.
        settings: of the model.
        tensors: the upsampler's, by the published names, contiguous and in the order of the table.
        rows: the table of this model.

    Raises:
        TypeError: for settings that the method does not have.
        ValueError: if tensors are missing, unknown, of a wrong shape or type (all are listed), are another model's, or
            if the settings contradict the shapes.
    """

    def __init__(self, method: str, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any] | None = None):
        found = catalogue.find(method)
        selected = found.config.select(tensors)
        told, settings = found.config.shapes_tell(selected), {**found.settings, **(settings or {})}
        found.config().replace(**{name: value for name, value in settings.items() if name not in told})
        try:
            table = tuple(found.config(**told).rows())
        except ValueError:  # shapes that no model has: say which tensors do not fit the default one
            table = tuple(found.config().rows())
        if lines := faults(table, selected):
            whose = recognise(tensors)
            ours = f"these are the weights of {whose}, not of {method}."
            raise ValueError(ours if whose not in (None, method) else listed(found.model, lines))
        if wrong := [name for name in told if settings.get(name, told[name]) != told[name]]:
            asked, given = (", ".join(f"{n}={x[n]!r}" for n in wrong) for x in (settings, told))
            raise ValueError(f"{asked} contradicts the weights, which say {given}; leave out what the weights decide.")
        self.method = method
        self.settings: UpsamplerConfig = found.config().replace(**{**settings, **told})
        self.rows = table
        self.tensors = {key: np.asarray(selected[key], order="C") for key in by_name(table)}

    @property
    def config(self) -> dict[str, Any]:
        """What a file carries beside the weights."""
        return {KEY: self.method, **dataclasses.asdict(self.settings)}

    def flax(self) -> dict[str, np.ndarray]:
        """Return Flax path -> array in Flax's layout."""
        return to_flax(self.rows, self.tensors)

    @classmethod
    def from_flax(
        cls, method: str, parameters: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> UpsamplerCheckpoint:
        """Build from Flax path -> array in Flax's layout and all settings. Raises ValueError as the class does."""
        found = catalogue.find(method)
        rows = tuple(found.config().replace(**settings).rows())
        return cls(method, to_torch(found.model, rows, parameters), settings)


def recognise(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Return the name of the upsampler whose weights these are, by names and shapes; None if of none."""
    for name, method in catalogue.METHODS.items():
        try:
            selected = method.config.select(tensors)
            rows = tuple(method.config(**method.config.shapes_tell(selected)).rows())
        except ValueError:
            continue
        if rows and not faults(rows, selected):
            return name
    return None


def to_published(rows: tuple[Row, ...], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return published name -> array in PyTorch's layout, of some of the Flax arrays by their paths.

    A tensor of which only parts are given, as gradients are where a part never reaches the output, is zero elsewhere.

    Raises ValueError for arrays that are not in the table, or have another shape than there.
    """
    table = by_name(rows, flax=True)
    if lines := faults([table[path] for path in arrays if path in table], arrays, flax=True):
        raise ValueError(listed("the upsampler", lines))
    tensors: dict[str, np.ndarray] = {}
    for path, row in ((row.flax, row) for row in rows if row.flax in arrays):
        array = row.op.to_torch(np.asarray(arrays[path]))
        index, parts = row.part or (0, 1)
        size = [side or 0 for side in row.shape]
        whole = tensors.setdefault(row.torch, np.zeros(size, array.dtype))
        if parts == 1:
            whole[...] = array
        else:
            np.split(whole, parts)[index][...] = array
    return tensors


def unwrap(saved: Any, entries: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the state dict within what a training loop saved.

    Args:
        saved: what was saved, as plain data and arrays.
        entries: keys under which the state dict may be; the first one wins.

    Raises ValueError if there is none; the message says what there is instead.
    """
    for _ in range(8):
        if not isinstance(saved, Mapping):
            raise ValueError(f"it holds a {type(saved).__name__}, not a state dict.")
        inner = next((saved[key] for key in (*entries, "state_dict") if isinstance(saved.get(key), Mapping)), None)
        if inner is None:
            break
        saved = inner
    tensors = {key: x for key, x in saved.items() if isinstance(key, str) and isinstance(x, np.ndarray)}
    if not tensors:
        content = ", ".join(str(key)[:40] for key in list(saved)[:8]) or "nothing"
        raise ValueError(f"it holds no state dict: it has {content}.")
    while prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): x for key, x in tensors.items()}
    return tensors
