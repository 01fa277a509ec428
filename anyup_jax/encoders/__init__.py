"""Frozen vision encoders in Flax, with timm's names and timm's outputs.

```python
encoder = encoders.create("vit_small_patch14_dinov2", weights="model.safetensors", layer=-1)
features = encoder(encoder.normalize(image))  # (B, H, W, 3) in [0, 1] -> (B, H // 14, W // 14, C)
```

The catalogue of names, weights and sizes is `anyup_core.encoders`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyup_core.encoders.catalogue import names
    from anyup_jax.encoders.creation import create
    from anyup_jax.encoders.encoder import Encoder

_HOME = {
    "Encoder": "anyup_jax.encoders.encoder",
    "create": "anyup_jax.encoders.creation",
    "names": "anyup_core.encoders.catalogue",
}

__all__ = ["Encoder", "create", "names"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOME)}.")
