"""A Grain pipeline whose batches are upsampled as they come."""

import grain
import jax
import numpy as np
import skimage.data

import anyup_jax

photograph = np.float32(skimage.data.chelsea()) / 255
photograph = (photograph - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
model = anyup_jax.from_pretrained("anyup_efficientnet_lite")


def example(index):
    """Return a tile and its features, here random ones."""
    features = np.random.default_rng(index).standard_normal((4, 6, 48), np.float32)
    return dict(image=photograph[64:128, 32 * index : 32 * index + 96], features=features)


def upsample(batch):
    return batch | dict(hr=anyup_jax.upsample(model, batch["image"], batch["features"]))


pipeline = grain.MapDataset.range(6).shuffle(seed=0).map(example).batch(2).map(upsample)
batches = list(pipeline.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))
for batch in batches:
    plain = jax.jit(model)(batch["image"][:1], batch["features"][:1])
    np.testing.assert_allclose(batch["hr"][:1], plain, atol=1e-5)
print(f"Grain: {len(batches)} batches", batches[0]["features"].shape, "->", batches[0]["hr"].shape)
