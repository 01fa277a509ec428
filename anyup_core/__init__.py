"""What AnyUp is without a framework: configuration, geometry, files, checkpoints, encoders' catalogue, and export."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyup_core.export.inputs import onnx_inputs

__version__ = "0.1.0"
__all__ = ["__version__", "onnx_inputs"]


def __getattr__(name: str) -> Any:
    if name != "onnx_inputs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    return importlib.import_module("anyup_core.export.inputs").onnx_inputs
