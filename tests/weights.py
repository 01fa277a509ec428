"""Seeded weights of small models, in PyTorch's layout, built from the key table."""

from __future__ import annotations

import numpy as np

from anyup_core.checkpoints import key_table

SMALL = {"D": 16, "M": 24, "I": 3, "k": 3, "u": 3}
EQUAL = {"D": 16, "M": 16, "I": 3, "k": 1, "u": 5}  # no shortcut in the first ResBlock of the features


def random_weights(sizes: dict[str, int] = SMALL, *, seed: int = 0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Return a state dict of a model of these sizes; among the numbers are a negative zero and a NaN."""
    random = np.random.default_rng(seed)
    shapes = {row.torch: row.shape for row in key_table.expand(sizes)}
    tensors = {name: (0.1 * random.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
    tensors["cross_decode.cross_attn.attention.out_proj.bias"][:2] = -0.0, np.nan  # carried: never reaches the output
    return tensors


def assert_same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert tensor.tobytes() == right[name].tobytes(), name
