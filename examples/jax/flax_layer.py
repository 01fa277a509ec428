"""The upsampler as a layer of a Flax module, with a head of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data
from flax import nnx

import anyup_jax

image = jnp.asarray(skimage.data.chelsea()[64:128, 128:224], jnp.float32)[None] / 255
image = (image - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225])
features = jax.random.normal(jax.random.key(0), (1, 4, 6, 48))  # of any encoder
model = anyup_jax.from_pretrained("anyup_efficientnet_lite")


class Segmenter(nnx.Module):
    def __init__(self, classes, *, rngs):
        self.upsampler = model
        self.head = nnx.Linear(48, classes, rngs=rngs)

    def __call__(self, image, features):
        return self.upsampler(image, features, values=self.head(features))


segmenter = Segmenter(5, rngs=nnx.Rngs(0))
logits = nnx.jit(lambda segmenter: segmenter(image, features))(segmenter)
np.testing.assert_allclose(logits, segmenter.head(anyup_jax.upsample(model, image, features)), atol=1e-5)
print("a layer of a Flax module:", features.shape, "->", logits.shape)
