"""What tables of keys are made of: invertible changes of layout, and rows of correspondences with fixed shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Op:
    """A change of layout from PyTorch to Flax, and its inverse."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Op(lambda x: x, lambda x: x)
TRANSPOSE = Op(lambda x: x.T, lambda x: x.T)
OIHW_TO_HWIO = Op(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
DROP_CHANNEL = Op(lambda x: x[:, 0], lambda x: x[:, None])  # (M, 1, u, u) <-> (M, u, u)
