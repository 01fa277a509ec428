"""Each device upsamples its share of the batch, within `jax.shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import skimage.data

import anyup_jax

image = jnp.asarray(skimage.data.chelsea()[64:128, 128:224], jnp.float32)[None] / 255
image = (image - jnp.array([0.485, 0.456, 0.406])) / jnp.array([0.229, 0.224, 0.225])
model = anyup_jax.from_pretrained("anyup_efficientnet_lite")

mesh, share = jax.make_mesh((len(jax.devices()),), ("batch",)), jax.P("batch")
images = jnp.repeat(image, len(jax.devices()), 0)
maps = jax.random.normal(jax.random.key(0), (len(images), 4, 6, 48))  # of any encoder
spread = jax.device_put((images, maps), jax.NamedSharding(mesh, share))


@jax.jit
@jax.shard_map(mesh=mesh, in_specs=share, out_specs=share, check_vma=False)
def upsample(image, features):
    return model(image, features)


hr = upsample(*spread)
np.testing.assert_allclose(hr, anyup_jax.upsample(model, images, maps), atol=1e-5)
print(f"shard_map over {len(jax.devices())} devices:", maps.shape, "->", hr.shape)
