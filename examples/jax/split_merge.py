"""A pure function of the parameters, with `nnx.split` and `nnx.merge`."""

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

graph, parameters = nnx.split(model)


@jax.jit
def upsample(parameters, image, features):
    return nnx.merge(graph, parameters)(image, features)


hr = upsample(parameters, image, features)
np.testing.assert_allclose(hr, anyup_jax.upsample(model, image, features), atol=1e-5)
print("split and merge:", len(jax.tree.leaves(parameters)), "arrays,", features.shape, "->", hr.shape)
