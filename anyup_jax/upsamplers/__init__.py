"""Other upsamplers under one protocol: JAFAR, FeatUp, LoftUp and NAF with their published weights, and plain ones.

`from_pretrained(method, source)` returns a model that is called `model(image, features, output_size=None,
q_chunk_size=None)`, NHWC; AnyUp is one of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anyup_core.upsamplers.catalogue import NAMES

if TYPE_CHECKING:
    from anyup_jax.upsamplers.featup import FeatUp
    from anyup_jax.upsamplers.interpolation import Interpolation
    from anyup_jax.upsamplers.jafar import JAFAR
    from anyup_jax.upsamplers.joint_bilateral import JointBilateral
    from anyup_jax.upsamplers.loftup import LoftUp
    from anyup_jax.upsamplers.naf import NAF
    from anyup_jax.upsamplers.pretrained import checkpoint, from_pretrained, to_published
    from anyup_jax.upsamplers.protocol import Upsampler, upsample

_HOME = {
    "FeatUp": "anyup_jax.upsamplers.featup",
    "Interpolation": "anyup_jax.upsamplers.interpolation",
    "JAFAR": "anyup_jax.upsamplers.jafar",
    "JointBilateral": "anyup_jax.upsamplers.joint_bilateral",
    "LoftUp": "anyup_jax.upsamplers.loftup",
    "NAF": "anyup_jax.upsamplers.naf",
    "Upsampler": "anyup_jax.upsamplers.protocol",
    "checkpoint": "anyup_jax.upsamplers.pretrained",
    "from_pretrained": "anyup_jax.upsamplers.pretrained",
    "to_published": "anyup_jax.upsamplers.pretrained",
    "upsample": "anyup_jax.upsamplers.protocol",
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
    "to_published",
    "upsample",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}.")
    return getattr(importlib.import_module(_HOME[name]), name)
