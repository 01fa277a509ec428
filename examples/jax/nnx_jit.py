"""A model called within `nnx.jit`."""

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


@nnx.jit
def upsample(model, image, features):
    return model(image, features)


hr = upsample(model, image, features)
np.testing.assert_allclose(hr, anyup_jax.upsample(model, image, features), atol=1e-5)
print("nnx.jit:", features.shape, "->", hr.shape)
