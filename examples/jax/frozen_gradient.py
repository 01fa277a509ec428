"""A linear head is trained through the frozen upsampler."""

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data

import anyup_jax

image = jnp.asarray(skimage.data.chelsea()[64:128, 128:224], jnp.float32)[None] / 255
image = (image - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225])
features = jax.random.normal(jax.random.key(0), (1, 4, 6, 48))  # of any encoder
model = anyup_jax.from_pretrained("anyup_efficientnet_lite")

head = jax.random.normal(jax.random.key(1), (48, 5))


@jax.jit
@jax.value_and_grad
def loss(head):
    return jnp.square(model(image, features, values=features @ head)).mean()


value, gradient = loss(head)
hr = anyup_jax.upsample(model, image, features).reshape(-1, 48)  # the long way: the head comes after
np.testing.assert_allclose(gradient, 2 * hr.T @ (hr @ head) / (len(hr) * 5), atol=1e-5)
after, _ = loss(head - gradient)
assert after < value
print(f"gradient through frozen weights: a step takes the loss from {value:.4f} to {after:.4f}")
