"""The weights of an encoder: checks that tensors are exactly a model's, and maps them from timm to Flax and back.

Tensors that are another model's are recognised by their names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from anyup_core.checkpoints import key_table
from anyup_core.checkpoints.checkpoint import by_name, faults, listed, to_flax, to_torch
from anyup_core.encoders import catalogue
from anyup_core.encoders.rows import Row

FOREIGN = {
    "Hugging Face transformers": ("embeddings.", "encoder.layer.", "dinov2.", "resnet.", "vision_model.", "vit."),
    "OpenCLIP": ("visual.",),
    "torchvision": ("encoder.layers.encoder_layer_",),
    "Meta": ("storage_tokens", "rope_embed.", "mask_token"),
}
"""Library -> how its keys begin."""


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
        self.rows = present(self.published.config.rows(), tensors)
        if lines := faults(self.rows, tensors):
            raise ValueError(refusal(name, tensors, lines))
        self.tensors = {key: np.asarray(tensors[key], order="C") for key in by_name(self.rows)}

    @property
    def config(self) -> dict[str, str]:
        """What a file carries beside the weights."""
        return {"encoder": self.published.full_name}

    def flax(self, *, unused: bool = True) -> dict[str, np.ndarray]:
        """Return Flax path -> array in Flax's layout; without the `unused` ones if asked."""
        return to_flax([row for row in self.rows if unused or not row.unused], self.tensors)

    @classmethod
    def from_flax(cls, name: str, parameters: Mapping[str, np.ndarray]) -> EncoderCheckpoint:
        """Build from Flax path -> array in Flax's layout. Raises ValueError as the class does, with the Flax paths."""
        rows = present(catalogue.find(name).config.rows(), parameters)
        return cls(name, to_torch(name, rows, parameters))


def present(rows: Iterable[Row], names: Iterable[str]) -> tuple[Row, ...]:
    """Return the rows that a checkpoint must have: all but the optional groups of which it has nothing.

    Args:
        rows: the table.
        names: of the checkpoint's arrays, PyTorch keys or Flax paths.
    """
    rows, names = tuple(rows), set(names)
    groups = {row.optional for row in rows if not names.isdisjoint((row.flax, *row.keys))}
    return tuple(row for row in rows if not row.optional or row.optional in groups)


def refusal(name: str, tensors: Mapping[str, np.ndarray], lines: Sequence[str]) -> str:
    """Say whose weights these are; where that is unknown, list the faults."""
    if fitting := architectures(tensors):
        return f"These are the weights of {any_of(fitting)}, not of {name}."
    if not faults(key_table.expand(key_table.sizes_of(tensors)), tensors):
        return f"These are the weights of AnyUp, not of {name}."
    if library := next((name for key in tensors for name, starts in FOREIGN.items() if key.startswith(starts)), None):
        known = name.partition(".")[0] in catalogue.ARCHITECTURES
        file = f"model.safetensors of {catalogue.find(name).repository}" if known else "file that timm publishes"
        return f"These weights have the keys of {library} instead of timm's; give the {file} on the Hugging Face hub."
    return listed(name, lines)


def architectures(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of all architectures whose weights these can be, by names, shapes and types."""
    tables = ((name, present(entry.config.rows(), tensors)) for name, entry in catalogue.ARCHITECTURES.items())
    return [name for name, rows in tables if not faults(rows, tensors)]


def any_of(names: Sequence[str]) -> str:
    """Return the names as a list in a sentence; of many, the first ones."""
    return " or ".join(names[:4]) + (" or others" if len(names) > 4 else "")
