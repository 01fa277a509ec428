"""Applies a key table: checks that tensors are exactly a model's, and maps them from PyTorch to Flax and back."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from anyup_core.checkpoints import key_table
from anyup_core.encoders.rows import Row

LOG = logging.getLogger(__name__)
_SMALL = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
FLOATS = tuple(np.dtype(t) for t in (np.float16, np.float32, np.float64, *_SMALL))


class Checkpoint:
    """The weights of one model, complete and of the right shapes.

    Args:
        tensors: PyTorch key -> array in PyTorch's layout.
        config: fields of `AnyUpConfig` that the weights do not tell, or tell alike.

    Attributes:
        tensors: the same, contiguous and in the order of the table.
        config: these fields, and those that follow from the shapes.
        rows: the table of this model.

    Raises:
        ValueError: if tensors are missing, unknown, of a wrong shape or not floating point (all are listed), or if
            `config` says another architecture than the shapes.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None):
        sizes = key_table.sizes_of(tensors)
        self.rows = key_table.expand(sizes)
        if lines := faults(self.rows, tensors):
            raise ValueError(listed("AnyUp", lines))
        self.tensors = {key: np.asarray(tensors[key], order="C") for key in by_name(self.rows)}
        self.config = key_table.config_of(sizes)
        self.config = self.configured(**(config or {}))

    def flax(self) -> dict[str, np.ndarray]:
        """Return Flax path -> array in Flax's layout."""
        return to_flax(self.rows, self.tensors)

    @classmethod
    def from_flax(cls, parameters: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> Checkpoint:
        """Build from Flax path -> array in Flax's layout. Raises ValueError as the class does, with the Flax paths."""
        rows = key_table.expand(key_table.sizes_of(parameters, flax=True))
        return cls(to_torch("AnyUp", rows, parameters), config)

    def configured(self, /, **overrides: Any) -> dict[str, Any]:
        """Return the configuration with some fields changed. Raises ValueError if one contradicts the weights."""
        if "lfu_dim" in overrides and overrides["lfu_dim"] == self.config["qk_dim"]:
            overrides["lfu_dim"] = None
        fields = key_table.LETTERS.values()
        if wrong := [name for name in fields if overrides.get(name, self.config[name]) != self.config[name]]:
            asked, given = (", ".join(f"{n}={x[n]!r}" for n in wrong) for x in (overrides, self.config))
            raise ValueError(
                f"{asked} contradicts the weights, whose shapes say {given}; leave out what the weights decide."
            )
        return {**self.config, **overrides}


def by_name(rows: Iterable[Row], *, flax: bool = False) -> dict[str, Row]:
    """Return the row of every PyTorch key, or of every Flax path."""
    return {name: row for row in rows for name in ((row.flax,) if flax else row.keys)}


def to_flax(rows: Iterable[Row], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return Flax path -> contiguous array of PyTorch key -> tensor."""
    arrays = {}
    for row in rows:
        layers = [row.to_flax(tensors[key]) for key in row.keys]
        arrays[row.flax] = np.stack(layers) if row.stack else np.asarray(layers[0], order="C")
    return arrays


def to_torch(model: str, rows: Sequence[Row], parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return PyTorch key -> tensor of Flax path -> array.

    Raises:
        ValueError: if the arrays are not those of the table, which is the model's; or if parts of a tensor differ in
            their type.
    """
    if lines := faults(rows, parameters, flax=True):
        raise ValueError(listed(model, lines))
    parts: dict[str, list[np.ndarray]] = {}
    for row in rows:
        layers = parameters[row.flax] if row.stack else [parameters[row.flax]]
        for key, layer in zip(row.keys, layers):
            parts.setdefault(key, []).append(row.op.to_torch(np.asarray(layer)))
    if mixed := sorted(key for key, arrays in parts.items() if len({array.dtype for array in arrays}) > 1):
        raise ValueError(f"The parts of {', '.join(mixed)} differ in their number type; give them the same one.")
    return {key: np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for key, arrays in parts.items()}


def faults(rows: Iterable[Row], tensors: Mapping[str, np.ndarray], *, flax: bool = False) -> list[str]:
    """Return a line for every tensor that is missing, unknown, or of a wrong shape or type.

    Args:
        rows: the table.
        tensors: the arrays by their PyTorch keys, or by their Flax paths if `flax`.
        flax: which of the two.
    """
    expected = by_name(rows, flax=flax)
    shapes = {name: row.flax_shape if flax else row.shape for name, row in expected.items()}
    return differences(shapes, {name for name, row in expected.items() if row.integer}, tensors)


def differences(
    shapes: Mapping[str, tuple[int | None, ...]], integers: Container[str], tensors: Mapping[str, np.ndarray]
) -> list[str]:
    """Return a line for every tensor that is missing, unknown, or of a wrong shape or type.

    Args:
        shapes: of the tensors that are expected, None standing for any size.
        integers: names of those that hold whole numbers; the others are floating point.
        tensors: what there is.
    """
    lines = [f"missing: {name} {shape_text(shape)}" for name, shape in shapes.items() if name not in tensors]
    lines += [f"not part of the model: {name} {x.shape}" for name, x in tensors.items() if name not in shapes]
    for name in (name for name in shapes if name in tensors):
        shape, dtype, integer = tensors[name].shape, tensors[name].dtype, name in integers
        if not fits(shape, shapes[name]):
            lines.append(f"wrong shape: {name} is {shape}, must be {shape_text(shapes[name])}")
        elif not (dtype.kind in "iu" if integer else dtype in FLOATS):
            lines.append(
                f"wrong type: {name} holds {dtype}, must be {'whole numbers' if integer else 'floating point'}"
            )
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
        floats = ((name, x) for name, x in tensors.items() if x.dtype in FLOATS)
        odd = [name for name, x in floats if not np.isfinite(x.astype(np.float32, copy=False)).all()]
    if odd:
        listed = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if odd[3:] else "")
        LOG.warning("%s holds NaN or numbers that are infinite in float32, in %s.", origin, listed)
