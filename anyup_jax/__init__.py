"""AnyUp, the universal feature upsampler (arXiv 2510.12764), in JAX and Flax.

The names below and the modules are imported when they are first used, so that the command line loads without jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anyup_core import __version__

if TYPE_CHECKING:
    from anyup_core import visualize
    from anyup_core.config import AnyUpConfig
    from anyup_jax import encoders, upsamplers
    from anyup_jax.bands import upsample_bands
    from anyup_jax.exporting import export, load_exported
    from anyup_jax.model import AnyUp, upsample, upsample_many
    from anyup_jax.pretrained import from_pretrained
    from anyup_jax.tokens import tokens_to_map

_HOME = {
    "AnyUp": "anyup_jax.model",
    "AnyUpConfig": "anyup_core.config",
    "export": "anyup_jax.exporting",
    "from_pretrained": "anyup_jax.pretrained",
    "load_exported": "anyup_jax.exporting",
    "tokens_to_map": "anyup_jax.tokens",
    "upsample": "anyup_jax.model",
    "upsample_bands": "anyup_jax.bands",
    "upsample_many": "anyup_jax.model",
    "attention": "anyup_jax.attention",
    "bands": "anyup_jax.bands",
    "exporting": "anyup_jax.exporting",
    "layers": "anyup_jax.layers",
    "model": "anyup_jax.model",
    "pretrained": "anyup_jax.pretrained",
    "sharding": "anyup_jax.sharding",
    "tokens": "anyup_jax.tokens",
    "encoders": "anyup_jax.encoders",
    "upsamplers": "anyup_jax.upsamplers",
    "visualize": "anyup_core.visualize",
}

__all__ = [
    "AnyUp",
    "AnyUpConfig",
    "__version__",
    "encoders",
    "export",
    "from_pretrained",
    "load_exported",
    "tokens_to_map",
    "upsample",
    "upsample_bands",
    "upsample_many",
    "upsamplers",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}.")
    module = importlib.import_module(_HOME[name])
    return module if _HOME[name].endswith(f".{name}") else getattr(module, name)
