"""The key table of AnyUp: which PyTorch tensor is which Flax parameter, with shapes.

Sizes have letters: D is `qk_dim`, M the filters of the feature unification, I `input_dim`, k `kernel_size` and u
`kernel_size_lfu`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anyup_core.encoders.rows import Row, conv, linear, norm
from anyup_core.layouts import DROP_CHANNEL, SAME, TRANSPOSE

LETTERS = {"D": "qk_dim", "M": "lfu_dim", "I": "input_dim", "k": "kernel_size", "u": "kernel_size_lfu"}
"""The configuration field each letter stands for; these fields follow from the shapes of the weights."""

DEFAULT_SIZES = {"D": 128, "M": 128, "I": 3, "k": 1, "u": 5}
"""Sizes taken for letters that no tensor tells, so that the missing tensors can still be named with their shapes."""

DISTINCT_SIZES = {"D": 1009, "M": 1013, "I": 1019, "k": 1021, "u": 1031}
"""Sizes of a model whose shapes tell which axis has which letter: none is another's multiple, or fixed in the table."""

ATTENTION = "cross_decode.cross_attn.attention"


def expand(sizes: Mapping[str, int]) -> tuple[Row, ...]:
    """Return the table of a model of the given sizes (a letter each), in the order of PyTorch's `state_dict()`."""
    return tuple(_rows(**sizes))


def _rows(D: int, M: int, I: int, k: int, u: int) -> Iterator[Row]:  # noqa: E741
    yield from _encoder("image_encoder", I, D, k)
    yield from _encoder("key_encoder", D, D, 1)
    yield from _encoder("query_encoder", D, D, 1)
    yield Row("key_features_encoder.0.basis", (M, 1, u, u), "key_features_encoder.unify.basis", DROP_CHANNEL)
    yield from _res_block("key_features_encoder", 1, M, D)
    yield from _res_block("key_features_encoder", 2, D, D)
    for name in ("norm_q", "norm_k"):
        yield Row(f"cross_decode.cross_attn.{name}.weight", (D,), f"cross_decode.{name}.scale")
    for end, shape, flax, op in (("weight", (3 * D, D), "kernel", TRANSPOSE), ("bias", (3 * D,), "bias", SAME)):
        for i, name in enumerate(("query", "key", "value")):
            key, path = f"{ATTENTION}.in_proj_{end}", f"cross_decode.{name}.{flax}"
            yield Row(key, shape, path, op, part=(i, 3), unused=name == "value")
    yield from linear(f"{ATTENTION}.out_proj", D, D, "cross_decode.out", unused=True)
    yield from conv("cross_decode.conv2d", (D, D, 3, 3), "cross_decode.conv", bias=False)
    yield from _encoder("aggregation", 2 * D, D, 3)
    yield Row("rope.freqs", (2, D), "rope.freqs")


def _encoder(name: str, inputs: int, outputs: int, kernel: int) -> Iterator[Row]:
    yield from conv(f"{name}.0", (outputs, inputs, kernel, kernel), f"{name}.conv", bias=False)
    for i in (1, 2):
        yield from _res_block(name, i, outputs, outputs)


def _res_block(encoder: str, i: int, inputs: int, outputs: int) -> Iterator[Row]:
    """Yield the rows of one ResBlock; PyTorch's Sequential counts the SiLUs, hence the gaps."""
    torch, flax = f"{encoder}.{i}", f"{encoder}.block{i}"
    yield from norm(f"{torch}.block.0", inputs, f"{flax}.norm1")
    yield from conv(f"{torch}.block.2", (outputs, inputs, 1, 1), f"{flax}.conv1", bias=False)
    yield from norm(f"{torch}.block.3", outputs, f"{flax}.norm2")
    yield from conv(f"{torch}.block.5", (outputs, outputs, 1, 1), f"{flax}.conv2", bias=False)
    if inputs != outputs:
        yield from conv(f"{torch}.shortcut", (outputs, inputs, 1, 1), f"{flax}.shortcut", bias=False)


def sizes_of(tensors: Mapping[str, np.ndarray], *, flax: bool = False) -> dict[str, int]:
    """Return the size each letter has in most of the tensors, which are Flax parameters by their paths if `flax`.

    Most, because a single tensor of a wrong shape should be the one that is reported as wrong.
    """
    letters = {size: letter for letter, size in DISTINCT_SIZES.items()}
    votes: dict[str, collections.Counter[int]] = {letter: collections.Counter() for letter in LETTERS}
    for row in expand(DISTINCT_SIZES):
        name, axes = (row.flax, row.flax_shape) if flax else (row.torch, row.shape)
        if name in tensors and tensors[name].ndim == len(axes):
            for axis, size in zip(axes, tensors[name].shape):
                if axis in letters:
                    votes[letters[axis]][size] += 1
    return {
        letter: max(votes[letter], key=votes[letter].__getitem__, default=DEFAULT_SIZES[letter]) for letter in LETTERS
    }


def config_of(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration fields that the sizes tell; `lfu_dim` is None where it equals `qk_dim`."""
    fields: dict[str, Any] = {LETTERS[letter]: size for letter, size in sizes.items()}
    return fields | {"lfu_dim": None if sizes["M"] == sizes["D"] else sizes["M"]}
