"""AnyUp, the universal feature upsampler (arXiv 2510.12764), in PyTorch.

The names below are imported when they are first used, so that the command line and the framework-free modules
(config, geometry, visualize) load without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyup_torch.config import AnyUpConfig
    from anyup_torch.model import AnyUp
    from anyup_torch.pretrained import from_pretrained

_HOME = {"AnyUp": "model", "AnyUpConfig": "config", "from_pretrained": "pretrained"}

__all__ = ["AnyUp", "AnyUpConfig", "from_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}.")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
