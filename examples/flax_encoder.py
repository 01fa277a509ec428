"""Image to upsampled features in one compiled JAX program, without PyTorch: `python examples/flax_encoder.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
from flax import nnx

import anyup_jax
from anyup_jax import encoders

MEAN, STD = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])  # ImageNet: AnyUp's guidance image


@jax.jit
def upsampled(model: anyup_jax.AnyUp, encoder: encoders.Encoder, image: jax.Array) -> jax.Array:
    features = encoder(encoder.normalize(image))
    return model((image - MEAN) / STD, features)


def main() -> None:
    photograph = jnp.asarray(skimage.data.chelsea()[:288, :448], np.float32)[None] / 255
    encoder = encoders.create("efficientnet_lite0", layer=-1)
    model = anyup_jax.AnyUp(rngs=nnx.Rngs(0))
    print(f"{photograph.shape} -> {upsampled(model, encoder, photograph).shape}")


if __name__ == "__main__":
    main()
