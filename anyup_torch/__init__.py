"""AnyUp, the universal feature upsampler (arXiv 2510.12764), in PyTorch.

The names below and the modules are imported when they are first used, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyup_core.config import AnyUpConfig
    from anyup_torch.bands import upsample_bands
    from anyup_torch.model import AnyUp
    from anyup_torch.pretrained import from_pretrained

_HOME = {
    "AnyUp": "anyup_torch.model",
    "AnyUpConfig": "anyup_core.config",
    "from_pretrained": "anyup_torch.pretrained",
    "upsample_bands": "anyup_torch.bands",
}

__all__ = ["AnyUp", "AnyUpConfig", "from_pretrained", "upsample_bands"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    module = "anyup_core.visualize" if name == "visualize" else f"{__name__}.{name}"
    if name.startswith("_") or importlib.util.find_spec(module) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}.")
    return importlib.import_module(module)
