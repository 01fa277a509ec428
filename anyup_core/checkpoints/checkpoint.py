"""Applies the table: checks that tensors are exactly a model's, and maps them from PyTorch to Flax and back."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from anyup_core.checkpoints import key_table

LOG = logging.getLogger(__name__)
_SMALL = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
FLOATS = tuple(np.dtype(t) for t in (np.float16, np.float32, np.float64, *_SMALL))
SHAPE_FIELDS = tuple(key_table.LETTERS.values())


class Checkpoint:
    """The weights of one model, complete and of the right shapes.

    Args:
        tensors: PyTorch key -> array in PyTorch's layout.
        config: fields of `AnyUpConfig` that the weights do not tell, or tell alike.

    Attributes:
        tensors: the same, contiguous and in the order of the table.
        config: these fields, and those that follow from the shapes.
        entries: the table of this model.

    Raises:
        ValueError: if tensors are missing, unknown, of a wrong shape or not floating point (all are listed), or if
            `config` says another architecture than the shapes.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None):
        sizes = key_table.sizes_of({name: tensor.shape for name, tensor in tensors.items()})
        self.entries = key_table.expand(sizes)
        expected = {entry.torch: entry.torch_shape for entry in self.entries}
        if lines := faults(tensors, expected):
            raise ValueError(listed("AnyUp", lines))
        self.tensors = {name: np.ascontiguousarray(tensors[name]) for name in expected}
        self.config = combine(key_table.config_of(sizes), config or {})

    def flax(self) -> dict[str, np.ndarray]:
        """Return Flax path -> array in Flax's layout."""
        return {entry.flax: np.ascontiguousarray(entry.to_flax(self.tensors[entry.torch])) for entry in self.entries}

    @classmethod
    def from_flax(cls, parameters: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> Checkpoint:
        """Build from Flax path -> array in Flax's layout. Raises ValueError as the class does, with the Flax paths."""
        entries = key_table.expand(sizes_of_flax(parameters))
        if lines := faults(parameters, {entry.flax: entry.flax_shape for entry in entries}):
            raise ValueError(listed("AnyUp", lines))
        parts: dict[str, list[np.ndarray]] = {}
        for entry in entries:
            parts.setdefault(entry.torch, []).append(entry.op.to_torch(parameters[entry.flax]))
        mixed = sorted(name for name, arrays in parts.items() if len({array.dtype for array in arrays}) > 1)
        if mixed:
            raise ValueError(f"The parts of {', '.join(mixed)} differ in their number type; give them the same one.")
        return cls({name: np.concatenate(arrays) for name, arrays in parts.items()}, config)

    def configured(self, **overrides: Any) -> dict[str, Any]:
        """Return the configuration with some fields changed. Raises ValueError if one contradicts the weights."""
        return combine(self.config, overrides)


def faults(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int | None, ...]], integers: Collection[str] = ()
) -> list[str]:
    """Return a line for every tensor that is missing, unknown, or of a wrong shape or type.

    Args:
        tensors: what there is.
        expected: name -> shape, in which None stands for any size.
        integers: names of those that hold whole numbers; the others are floating point.
    """
    lines = [f"missing: {name} {shape_text(shape)}" for name, shape in expected.items() if name not in tensors]
    lines += [f"not part of the model: {name} {x.shape}" for name, x in tensors.items() if name not in expected]
    for name in (name for name in expected if name in tensors):
        shape, dtype = tensors[name].shape, tensors[name].dtype
        if not fits(shape, expected[name]):
            lines.append(f"wrong shape: {name} is {shape}, must be {shape_text(expected[name])}")
        elif not (dtype.kind in "iu" if name in integers else dtype in FLOATS):
            kind = "whole numbers" if name in integers else "floating point"
            lines.append(f"wrong type: {name} holds {dtype}, must be {kind}")
    return lines


def listed(model: str, lines: Sequence[str]) -> str:
    noun = "tensor does" if len(lines) == 1 else "tensors do"
    return f"{len(lines)} {noun} not fit {model}:\n  " + "\n  ".join(lines)


def fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(must in (None, size) for size, must in zip(shape, expected))


def shape_text(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


def warn_unless_finite(tensors: Mapping[str, np.ndarray], origin: Path) -> None:
    """Log the floating-point tensors that hold NaN or infinity, or will when they are computed with as float32."""
    with np.errstate(over="ignore"):
        odd = [
            name
            for name, tensor in tensors.items()
            if tensor.dtype in FLOATS and not np.isfinite(tensor.astype(np.float32, copy=False)).all()
        ]
    if odd:
        listed = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if odd[3:] else "")
        LOG.warning("%s holds NaN or numbers that are infinite in float32, in %s.", origin, listed)


def combine(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with `overrides`, which must not change a field that the weights' shapes decide."""
    overrides = dict(overrides)
    if "lfu_dim" in overrides and overrides["lfu_dim"] == config["qk_dim"]:
        overrides["lfu_dim"] = None
    wrong = {name: overrides[name] for name in SHAPE_FIELDS if name in overrides and overrides[name] != config[name]}
    if wrong:
        asked = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        given = ", ".join(f"{name}={config[name]!r}" for name in wrong)
        raise ValueError(
            f"{asked} contradicts the weights, whose shapes say {given}; leave out what the weights decide."
        )
    return {**config, **overrides}


def sizes_of_flax(parameters: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return the sizes (a letter each) that most of the Flax parameters have; see `key_table.sizes_of`."""
    shapes = {}
    for entry in key_table.expand(key_table.DEFAULT_SIZES | {"M": 0}):  # unequal D and M: with the shortcut's row
        array = parameters.get(entry.flax)
        if entry.part is None and array is not None and array.ndim == len(entry.flax_shape):
            shapes[entry.torch] = entry.op.to_torch(np.broadcast_to(np.float32(0), array.shape)).shape
    return key_table.sizes_of(shapes)
