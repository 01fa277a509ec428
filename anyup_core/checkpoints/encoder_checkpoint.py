"""The weights of an encoder: checks that tensors are exactly a model's, and maps them from timm to Flax and back.

Tensors that are another model's are recognised by their names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from anyup_core.checkpoints.checkpoint import Checkpoint, faults, listed
from anyup_core.encoders import catalogue
from anyup_core.encoders.rows import Row

FOREIGN = {
    "embeddings.": "Hugging Face transformers",
    "encoder.layer.": "Hugging Face transformers",
    "dinov2.": "Hugging Face transformers",
    "resnet.": "Hugging Face transformers",
    "vision_model.": "Hugging Face transformers",
    "vit.": "Hugging Face transformers",
    "visual.": "OpenCLIP",
    "encoder.layers.encoder_layer_": "torchvision",
    **dict.fromkeys(("storage_tokens", "rope_embed.", "mask_token"), "Meta"),
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
        if lines := row_faults(self.rows, tensors):
            raise ValueError(refusal(name, tensors, lines))
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
        if lines := faults(parameters, expected, {row.flax for row in rows if row.integer}):
            raise ValueError(listed(name, lines))
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


def row_faults(rows: Iterable[Row], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return a line for every tensor that is not as the rows say; see `checkpoint.faults`."""
    by_key = {key: row for row in rows for key in row.keys}
    return faults(
        tensors, {key: row.shape for key, row in by_key.items()}, {key for key, row in by_key.items() if row.integer}
    )


def refusal(name: str, tensors: Mapping[str, np.ndarray], lines: Sequence[str]) -> str:
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
    return listed(name, lines)


def architectures(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of all architectures whose weights these can be, by names, shapes and types."""
    tables = ((name, table(entry.config)) for name, entry in catalogue.ARCHITECTURES.items())
    return [name for name, rows in tables if not row_faults(present(rows, tensors), tensors)]


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
