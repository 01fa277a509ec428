"""The weights of an encoder: checks that tensors are exactly a model's, and maps them from timm to Flax and back.

Tensors that are another model's are recognised by their names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from anyup_core.checkpoints.checkpoint import FLOATS, Checkpoint
from anyup_core.encoders import catalogue
from anyup_core.encoders.rows import Row

FOREIGN = {
    "embeddings.": "Hugging Face transformers",
    "encoder.layer": "Hugging Face transformers",
    "vision_model.": "Hugging Face transformers",
    "vit.": "Hugging Face transformers",
    "visual.": "OpenCLIP",
}
"""How the keys of other libraries begin -> the library."""


def table(config: catalogue.Config) -> tuple[Row, ...]:
    """Return the rows of an architecture."""
    return tuple(config.rows())


class EncoderCheckpoint:
    """The weights of one encoder, complete and of the right shapes.

    Args:
        name: of the encoder, as in `anyup_jax.encoders.names()`.
        tensors: timm's key -> array in PyTorch's layout.

    Attributes:
        published: what the catalogue says of the name.
        tensors: the same, in the order of the table.
        rows: those rows of the table that these weights have.

    Raises:
        ValueError: for an unknown name; for the weights of another model, which is named; or if tensors are missing,
            unknown, of a wrong shape or type: all are listed.
    """

    def __init__(self, name: str, tensors: Mapping[str, np.ndarray]):
        self.published = catalogue.find(name)
        self.rows = present(table(self.published.config), tensors)
        if found := faults(self.rows, tensors):
            raise ValueError(refusal(name, tensors, found))
        self.tensors = {key: np.asarray(tensors[key], order="C") for row in self.rows for key in row.keys}

    @property
    def config(self) -> dict[str, str]:
        """What a file carries beside the weights."""
        return {"encoder": self.published.full_name}

    def flax(self, *, unused: bool = True) -> dict[str, np.ndarray]:
        """Return Flax path -> array in Flax's layout; without the `unused` ones if asked."""
        arrays = {}
        for row in self.rows:
            if unused or not row.unused:
                layers = [row.op.to_flax(self.tensors[key]) for key in row.keys]
                arrays[row.flax] = np.stack(layers) if row.stack else np.asarray(layers[0], order="C")
        return arrays

    @classmethod
    def from_flax(cls, name: str, parameters: Mapping[str, np.ndarray]) -> EncoderCheckpoint:
        """Build from Flax path -> array in Flax's layout. Raises ValueError as the class does, with the Flax paths."""
        known = table(catalogue.find(name).config)
        groups = {row.optional for row in known if row.flax in parameters}
        rows = [row for row in known if not row.optional or row.optional in groups]
        expected = {row.flax: row.flax_shape for row in rows}
        found = [f"missing: {path} {shape_text(shape)}" for path, shape in expected.items() if path not in parameters]
        found += [f"not part of the model: {path} {x.shape}" for path, x in parameters.items() if path not in expected]
        found += [
            f"wrong shape: {path} is {parameters[path].shape}, must be {shape_text(shape)}"
            for path, shape in expected.items()
            if path in parameters and not fits(parameters[path].shape, shape)
        ]
        if found:
            raise ValueError(listed(name, found))
        tensors = {}
        for row in rows:
            layers = parameters[row.flax] if row.stack else [parameters[row.flax]]
            tensors |= {key: row.op.to_torch(np.asarray(layer)) for key, layer in zip(row.keys, layers)}
        return cls(name, tensors)


def present(rows: Iterable[Row], tensors: Iterable[str]) -> tuple[Row, ...]:
    """Return the rows that a checkpoint must have: all but the optional groups of which it has nothing."""
    rows, tensors = tuple(rows), set(tensors)
    groups = {row.optional for row in rows if tensors.intersection(row.keys)}
    return tuple(row for row in rows if not row.optional or row.optional in groups)


def faults(rows: Iterable[Row], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return a line for every tensor that is missing, unknown, or of a wrong shape or type."""
    expected = {key: row for row in rows for key in row.keys}
    found = [f"missing: {key} {shape_text(row.shape)}" for key, row in expected.items() if key not in tensors]
    found += [f"not part of the model: {key} {x.shape}" for key, x in tensors.items() if key not in expected]
    for key, row in expected.items():
        if key not in tensors:
            continue
        shape, dtype = tensors[key].shape, tensors[key].dtype
        if not fits(shape, row.shape):
            found.append(f"wrong shape: {key} is {shape}, must be {shape_text(row.shape)}")
        elif row.integer != (dtype.kind in "iu") or not (row.integer or dtype in FLOATS):
            found.append(f"wrong type: {key} holds {dtype}, must be {'whole numbers' if row.integer else 'floating'}")
    return found


def refusal(name: str, tensors: Mapping[str, np.ndarray], found: Sequence[str]) -> str:
    """Say whose weights these are; where that is unknown, list the faults."""
    if fitting := architectures(tensors):
        return f"These are the weights of {any_of(fitting)}, not of {name}."
    if is_anyup(tensors):
        return f"These are the weights of AnyUp, not of {name}."
    if layout := next((FOREIGN[part] for key in tensors for part in FOREIGN if key.startswith(part)), None):
        return (
            f"These weights have the keys of {layout} instead of timm's; give the model.safetensors of the repository "
            f"{catalogue.find(name).repository} on the Hugging Face hub."
        )
    return listed(name, found)


def listed(name: str, found: Sequence[str]) -> str:
    noun = "tensor does" if len(found) == 1 else "tensors do"
    return f"{len(found)} {noun} not fit {name}:\n  " + "\n  ".join(found)


def architectures(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of all architectures whose weights these can be, by names, shapes and types."""
    tables = ((name, table(entry.config)) for name, entry in catalogue.ARCHITECTURES.items())
    return [name for name, rows in tables if not faults(present(rows, tensors), tensors)]


def is_anyup(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the weights of AnyUp, in PyTorch's layout."""
    try:
        Checkpoint(tensors)
    except ValueError:
        return False
    return True


def any_of(names: Sequence[str]) -> str:
    """Return the names as a list in a sentence; of many, the first ones."""
    return " or ".join(names[:4]) + (" or others" if len(names) > 4 else "")


def fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(must in (None, size) for size, must in zip(shape, expected))


def shape_text(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
