"""AnyUp, the universal feature upsampler (arXiv 2510.12764), in PyTorch.

The names below and the modules are imported when they are first used, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anyup_core import __version__

if TYPE_CHECKING:
    from anyup_core import visualize
    from anyup_core.config import AnyUpConfig
    from anyup_torch import encoders, upsamplers
    from anyup_torch.bands import upsample_bands
    from anyup_torch.exporting import export
    from anyup_torch.image_code import ImageCode
    from anyup_torch.model import AnyUp, upsample_many
    from anyup_torch.onnx import export_onnx
    from anyup_torch.pretrained import from_pretrained
    from anyup_torch.tokens import tokens_to_map

_HOME = {
    "AnyUp": "anyup_torch.model",
    "AnyUpConfig": "anyup_core.config",
    "ImageCode": "anyup_torch.image_code",
    "export": "anyup_torch.exporting",
    "export_onnx": "anyup_torch.onnx",
    "from_pretrained": "anyup_torch.pretrained",
    "tokens_to_map": "anyup_torch.tokens",
    "upsample_bands": "anyup_torch.bands",
    "upsample_many": "anyup_torch.model",
    "attention": "anyup_torch.attention",
    "bands": "anyup_torch.bands",
    "exporting": "anyup_torch.exporting",
    "image_code": "anyup_torch.image_code",
    "layers": "anyup_torch.layers",
    "model": "anyup_torch.model",
    "pretrained": "anyup_torch.pretrained",
    "streaming": "anyup_torch.streaming",
    "tokens": "anyup_torch.tokens",
    "encoders": "anyup_torch.encoders",
    "upsamplers": "anyup_torch.upsamplers",
    "visualize": "anyup_core.visualize",
}

__all__ = [
    "AnyUp",
    "AnyUpConfig",
    "ImageCode",
    "__version__",
    "encoders",
    "export",
    "export_onnx",
    "from_pretrained",
    "tokens_to_map",
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
