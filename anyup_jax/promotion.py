"""The rules of promotion that this package is written for, whatever the user has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """JAX's default rules, within a block or, as a decorator, a function that may be traced.

    `JAX_NUMPY_RANK_PROMOTION=raise` and `JAX_NUMPY_DTYPE_PROMOTION=strict` are for the code of those who set them.
    Rules of differentiation need it too: they are traced outside of the function that they belong to.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
