"""The key table: which PyTorch tensor is which Flax parameter, with shapes, as data.

Shapes are written in letters: D is `qk_dim`, M the filters of the feature unification, I `input_dim`, k `kernel_size`
and u `kernel_size_lfu`; a digit before a letter multiplies it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import string
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anyup_core.layouts import DROP_CHANNEL, OIHW_TO_HWIO, SAME, TRANSPOSE, Op

LETTERS = {"D": "qk_dim", "M": "lfu_dim", "I": "input_dim", "k": "kernel_size", "u": "kernel_size_lfu"}
"""The configuration field each letter stands for; these fields follow from the shapes of the weights."""

DEFAULT_SIZES = {"D": 128, "M": 128, "I": 3, "k": 1, "u": 5}
"""Sizes taken for letters that no tensor tells, so that the missing tensors can still be named with their shapes."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One correspondence.

    Attributes:
        torch: PyTorch key; `{name}` stands for each of `FILL[name]`.
        shape: shape of the PyTorch tensor, in letters.
        flax: dot-joined path in the Flax model.
        op: how the layout changes.
        part: (i, n): only the i-th of n equal parts along the PyTorch tensor's first axis.
        unused: the weight never reaches the output; files keep it, so that nothing is lost.
        unless_equal: two letters; the row exists only where their sizes differ.
    """

    torch: str
    shape: str
    flax: str
    op: Op = SAME
    part: tuple[int, int] | None = None
    unused: bool = False
    unless_equal: str = ""


def res_block(torch: str, flax: str, inputs: str = "D") -> tuple[Row, ...]:
    """Rows of one ResBlock, `inputs` -> D channels; torch's Sequential counts the SiLUs, hence the gaps."""
    return (
        Row(f"{torch}.block.0.weight", inputs, f"{flax}.norm1.scale"),
        Row(f"{torch}.block.0.bias", inputs, f"{flax}.norm1.bias"),
        Row(f"{torch}.block.2.weight", f"D {inputs} 1 1", f"{flax}.conv1.kernel", OIHW_TO_HWIO),
        Row(f"{torch}.block.3.weight", "D", f"{flax}.norm2.scale"),
        Row(f"{torch}.block.3.bias", "D", f"{flax}.norm2.bias"),
        Row(f"{torch}.block.5.weight", "D D 1 1", f"{flax}.conv2.kernel", OIHW_TO_HWIO),
    )


ATTENTION = "cross_decode.cross_attn.attention"
FILL = {
    "guide": ("key_encoder", "query_encoder"),
    "encoder": ("image_encoder", "key_encoder", "query_encoder", "aggregation"),
    "i": ("1", "2"),
}
ROWS = (
    Row("image_encoder.0.weight", "D I k k", "image_encoder.conv.kernel", OIHW_TO_HWIO),
    Row("{guide}.0.weight", "D D 1 1", "{guide}.conv.kernel", OIHW_TO_HWIO),
    Row("aggregation.0.weight", "D 2D 3 3", "aggregation.conv.kernel", OIHW_TO_HWIO),
    *res_block("{encoder}.{i}", "{encoder}.block{i}"),
    Row("key_features_encoder.0.basis", "M 1 u u", "key_features_encoder.unify.basis", DROP_CHANNEL),
    *res_block("key_features_encoder.1", "key_features_encoder.block1", inputs="M"),
    Row(
        "key_features_encoder.1.shortcut.weight",
        "D M 1 1",
        "key_features_encoder.block1.shortcut.kernel",
        OIHW_TO_HWIO,
        unless_equal="DM",
    ),
    *res_block("key_features_encoder.2", "key_features_encoder.block2"),
    Row("cross_decode.conv2d.weight", "D D 3 3", "cross_decode.conv.kernel", OIHW_TO_HWIO),
    Row("cross_decode.cross_attn.norm_q.weight", "D", "cross_decode.norm_q.scale"),
    Row("cross_decode.cross_attn.norm_k.weight", "D", "cross_decode.norm_k.scale"),
    Row(f"{ATTENTION}.in_proj_weight", "3D D", "cross_decode.query.kernel", TRANSPOSE, part=(0, 3)),
    Row(f"{ATTENTION}.in_proj_weight", "3D D", "cross_decode.key.kernel", TRANSPOSE, part=(1, 3)),
    Row(f"{ATTENTION}.in_proj_weight", "3D D", "cross_decode.value.kernel", TRANSPOSE, part=(2, 3), unused=True),
    Row(f"{ATTENTION}.in_proj_bias", "3D", "cross_decode.query.bias", part=(0, 3)),
    Row(f"{ATTENTION}.in_proj_bias", "3D", "cross_decode.key.bias", part=(1, 3)),
    Row(f"{ATTENTION}.in_proj_bias", "3D", "cross_decode.value.bias", part=(2, 3), unused=True),
    Row(f"{ATTENTION}.out_proj.weight", "D D", "cross_decode.out.kernel", TRANSPOSE, unused=True),
    Row(f"{ATTENTION}.out_proj.bias", "D", "cross_decode.out.bias", unused=True),
    Row("rope.freqs", "2 D", "rope.freqs"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row without placeholders or letters: one Flax parameter and the (part of a) PyTorch tensor it is."""

    torch: str
    torch_shape: tuple[int, ...]
    flax: str
    op: Op
    part: tuple[int, int] | None
    unused: bool

    @property
    def flax_shape(self) -> tuple[int, ...]:
        return self.to_flax(np.broadcast_to(np.float32(0), self.torch_shape)).shape

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """Return the Flax parameter, a view."""
        if self.part is not None:
            index, parts = self.part
            size = tensor.shape[0] // parts
            tensor = tensor[index * size : (index + 1) * size]
        return self.op.to_flax(tensor)


def expand(sizes: Mapping[str, int]) -> tuple[Entry, ...]:
    """Return the table of a model of the given sizes (a letter each)."""
    return tuple(
        Entry(
            row.torch.format(**names), _shape(row.shape, sizes), row.flax.format(**names), row.op, row.part, row.unused
        )
        for row, names in _filled_rows()
        if not row.unless_equal or len({sizes[letter] for letter in row.unless_equal}) > 1
    )


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the size each letter has in most of the PyTorch tensors of these shapes.

    Most, because a single tensor of a wrong shape should be the one that is reported as wrong.
    """
    votes: dict[str, collections.Counter[int]] = {letter: collections.Counter() for letter in LETTERS}
    for row, names in _filled_rows():
        tokens, shape = row.shape.split(), shapes.get(row.torch.format(**names), ())
        for token, size in zip(tokens, shape if len(shape) == len(tokens) else ()):
            if token in votes:
                votes[token][size] += 1
    return {letter: max(votes[letter], key=votes[letter].get, default=DEFAULT_SIZES[letter]) for letter in LETTERS}


def config_of(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration fields that the sizes tell; `lfu_dim` is None where it equals `qk_dim`."""
    fields: dict[str, Any] = {LETTERS[letter]: size for letter, size in sizes.items()}
    return fields | {"lfu_dim": None if sizes["M"] == sizes["D"] else sizes["M"]}


def _filled_rows() -> Iterator[tuple[Row, dict[str, str]]]:
    """Yield every row with each filling of its placeholders; neighbours with the same placeholders stay together."""
    for names, rows in itertools.groupby(ROWS, lambda row: _placeholders(row.torch)):
        fillings = itertools.product(*(FILL[name] for name in names))
        for values, row in itertools.product(fillings, tuple(rows)):
            yield row, dict(zip(names, values))


def _placeholders(pattern: str) -> tuple[str, ...]:
    return tuple(name for _, name, _, _ in string.Formatter().parse(pattern) if name)


def _shape(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(_size(token, sizes) for token in shape.split())


def _size(token: str, sizes: Mapping[str, int]) -> int:
    if token.isdigit():
        return int(token)
    return int(token[:-1] or 1) * sizes[token[-1]]
