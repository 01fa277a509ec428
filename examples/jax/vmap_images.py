"""One image at a time, without a batch axis, and `jax.vmap` over several."""

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data

import anyup_jax

image = jnp.asarray(skimage.data.chelsea()[64:128, 128:224], jnp.float32)[None] / 255
image = (image - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225])
features = jax.random.normal(jax.random.key(0), (1, 4, 6, 48))  # of any encoder
model = anyup_jax.from_pretrained("anyup_efficientnet_lite")

images, maps = jnp.concatenate([image, image[:, ::-1]]), jnp.concatenate([features, -features])


@jax.jit
@jax.vmap
def upsample(image, features):
    return model(image[None], features[None])[0]


hr = upsample(images, maps)
np.testing.assert_allclose(hr, anyup_jax.upsample(model, images, maps), atol=1e-5)
print("vmap:", maps.shape, "->", hr.shape)
