"""AnyUp, the universal feature upsampler (arXiv 2510.12764), in JAX and Flax.

The names below and the modules are imported when they are first used, so that the command line loads without jax.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyup_core.config import AnyUpConfig
    from anyup_jax.bands import upsample_bands
    from anyup_jax.model import AnyUp, upsample
    from anyup_jax.pretrained import from_pretrained

_HOME = {
    "AnyUp": "anyup_jax.model",
    "AnyUpConfig": "anyup_core.config",
    "from_pretrained": "anyup_jax.pretrained",
    "upsample": "anyup_jax.model",
    "upsample_bands": "anyup_jax.bands",
}

__all__ = ["AnyUp", "AnyUpConfig", "from_pretrained", "upsample", "upsample_bands"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    module = "anyup_core.visualize" if name == "visualize" else f"{__name__}.{name}"
    if name.startswith("_") or importlib.util.find_spec(module) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}.")
    return importlib.import_module(module)
