"""AnyUp and other upsamplers under one protocol: `model(image, features, output_size=None, q_chunk_size=None)`, NCHW.

The names below and the modules are imported when they are first used, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anyup_core.upsamplers.catalogue import NAMES

if TYPE_CHECKING:
    from anyup_torch.upsamplers.featup import FeatUp
    from anyup_torch.upsamplers.interpolation import Interpolation
    from anyup_torch.upsamplers.jafar import JAFAR
    from anyup_torch.upsamplers.joint_bilateral import JointBilateral
    from anyup_torch.upsamplers.loftup import LoftUp
    from anyup_torch.upsamplers.naf import NAF
    from anyup_torch.upsamplers.pretrained import checkpoint, from_pretrained
    from anyup_torch.upsamplers.protocol import Upsampler

_HOME = {
    "FeatUp": "anyup_torch.upsamplers.featup",
    "Interpolation": "anyup_torch.upsamplers.interpolation",
    "JAFAR": "anyup_torch.upsamplers.jafar",
    "JointBilateral": "anyup_torch.upsamplers.joint_bilateral",
    "LoftUp": "anyup_torch.upsamplers.loftup",
    "NAF": "anyup_torch.upsamplers.naf",
    "Upsampler": "anyup_torch.upsamplers.protocol",
    "checkpoint": "anyup_torch.upsamplers.pretrained",
    "from_pretrained": "anyup_torch.upsamplers.pretrained",
    "featup": "anyup_torch.upsamplers.featup",
    "interpolation": "anyup_torch.upsamplers.interpolation",
    "jafar": "anyup_torch.upsamplers.jafar",
    "joint_bilateral": "anyup_torch.upsamplers.joint_bilateral",
    "loftup": "anyup_torch.upsamplers.loftup",
    "naf": "anyup_torch.upsamplers.naf",
    "pretrained": "anyup_torch.upsamplers.pretrained",
    "protocol": "anyup_torch.upsamplers.protocol",
}

__all__ = [
    "JAFAR",
    "NAF",
    "NAMES",
    "FeatUp",
    "Interpolation",
    "JointBilateral",
    "LoftUp",
    "Upsampler",
    "checkpoint",
    "from_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}.")
    module = importlib.import_module(_HOME[name])
    return module if _HOME[name].endswith(f".{name}") else getattr(module, name)
