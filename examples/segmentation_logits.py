"""Upsample a linear head's logits instead of features: `python examples/segmentation_logits.py`.

The head is applied at low resolution and its logits are sent through `values=`: the same result as upsampling the
features first, at a fraction of the memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import anyup_jax


def main() -> None:
    model = anyup_jax.AnyUp(rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 3)
    image = jax.random.normal(keys[0], (1, 224, 224, 3))
    features = jax.random.normal(keys[1], (1, 16, 16, 384))
    head = jax.random.normal(keys[2], (384, 21)) / 384**0.5

    logits = anyup_jax.upsample(model, image, features, values=features @ head)
    expensive = anyup_jax.upsample(model, image, features) @ head
    print(f"logits {logits.shape}; largest difference from the long way: {jnp.abs(logits - expensive).max():.1e}")


if __name__ == "__main__":
    main()
