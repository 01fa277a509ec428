"""What FeatUp is trained with: jitters of an image, an attention that downsamples, and a scale for each cell.

The downsampler and the scales are parameters of the training only; they are no part of the upsampler.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from anyup_jax.layers import Conv, uniform

JITTERS, BORDER, MAX_ZOOM = 5, 20, 2.0
DIRECTIONS = 30  # random projections of the features
LEAST_SCALE = 1e-4
DROP = 0.2  # share of the cells whose attention does not depend on the features
POINTS, ALPHA, BETA, GAMMA, W1, W2 = 1000, 0.1, 0.15, 0.005, 10.0, 3.0  # of the CRF term


class Helpers(nnx.Module):
    """The downsampler and the scales.

    Args:
        channels: of the features.
        patch: pixels of a cell along either axis.
        rngs: random streams for the initial parameters.
    """

    def __init__(self, channels: int, patch: int, *, rngs: nnx.Rngs):
        self.logit = Conv(channels, 1, use_bias=True, dtype=jnp.float32, rngs=rngs)
        self.weight = nnx.Param(1 + 0.01 * jax.random.normal(rngs.params(), (patch, patch)))
        self.bias = nnx.Param(0.01 * jax.random.normal(rngs.params(), (patch, patch)))
        bound = 0.1 * channels**-0.5
        self.scale_kernel = nnx.Param(uniform(rngs, (channels,), bound))
        self.scale_bias = nnx.Param(uniform(rngs, (), bound))

    def downsample(
        self, x: Float[Array, "B H W n"], logits: Float[Array, "B H W 1"], kept: Float[Array, "B h w"]
    ) -> Float[Array, "B h w n"]:
        """Average the positions of each cell, blurred, with an attention.

        All channels are averaged alike, so that features may be projected before it instead of after it.

        Args:
            x: what is averaged.
            logits: the attention's, which `self.logit` makes of the features at each position.
            kept: 0 where the attention forgets the features.
        """
        side = self.weight.shape[0]
        both = blur(jnp.concatenate([x, logits], -1))  # a weighted mean of logits is the logit of the mean
        patches = rearrange(both, "b (h y) (w x) c -> b h w (y x) c", y=side, x=side)
        logits = patches[..., -1] * kept[..., None] * self.weight[...].ravel() + self.bias[...].ravel()
        return jnp.einsum("bhwp,bhwpn->bhwn", jax.nn.softmax(logits, -1), patches[..., :-1], precision="highest")

    def scale(self, features: Float[Array, "B h w C"]) -> Float[Array, "B h w"]:
        """Return the error to be expected at every cell."""
        raw = jnp.einsum("bhwc,c->bhw", features, self.scale_kernel[...], precision="highest") + self.scale_bias[...]
        return jnp.maximum(jnp.exp(raw + 0.1), LEAST_SCALE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Jitter:
    """A crop of each photograph, with a reflected border and enlarged: what every row and column is made of.

    Attributes:
        rows, columns: weights of the photograph's rows (columns) in each row (column) of the crop.
    """

    rows: Float[Array, "B H H"]
    columns: Float[Array, "B W W"]

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = jnp.einsum("byh,bhwc->bywc", self.rows, x, precision="highest")
        return jnp.einsum("bxw,bywc->byxc", self.columns, x, precision="highest")

    @classmethod
    def draw(cls, keys: Key[Array, " B"], size: tuple[int, int]) -> Jitter:
        """Draw one for each photograph: zoom U(1, 2) or none, a place, and mirrored or not."""

        def one(key):
            u = jax.random.uniform(key, (5,))
            zoom = jnp.where(u[0] < 0.5, 1 + u[1] * (MAX_ZOOM - 1), 1.0)
            rows, columns = (_axis(n, zoom, place) for n, place in zip(size, (u[2], u[3])))
            return rows, jnp.where(u[4] < 0.5, columns[::-1], columns)

        return cls(*jax.vmap(one)(keys))


def _axis(size: int, zoom: Float[Array, ""], place: Float[Array, ""]) -> Float[Array, "size size"]:
    padded = size + 2 * BORDER
    free = jnp.floor(padded * zoom) - size + 1
    first = jnp.minimum(jnp.floor(place * free), free - 1)
    source = jnp.clip((first + jnp.arange(size) + 0.5) / zoom - 0.5, 0, padded - 1)
    low = jnp.floor(source)
    share = source - low
    weights = jnp.zeros((size, size))
    for index, weight in ((low, 1 - share), (low + 1, share)):
        cell = jnp.abs(jnp.minimum(index.astype(jnp.int32), padded - 1) - BORDER)
        cell = size - 1 - jnp.abs(size - 1 - cell)
        weights += weight[:, None] * jax.nn.one_hot(cell, size)
    return weights


def blur(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Blur with a 5 x 5 Gaussian of deviation 1; the border is reflected. Both sides must be at least 3."""
    weights = jnp.exp(-0.5 * jnp.square(jnp.arange(-2.0, 3.0)))
    weights = weights / weights.sum()
    for axis in (1, 2):
        padded = jnp.pad(x, [(2, 2) if a == axis else (0, 0) for a in range(4)], mode="reflect")
        size = x.shape[axis]
        x = sum((weights[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(5)), jnp.zeros(()))
    return x


def directions(keys: Key[Array, " B"], channels: int) -> Float[Array, "B C n"]:
    """Draw random unit vectors for each photograph."""
    drawn = jax.vmap(lambda key: jax.random.normal(key, (channels, DIRECTIONS)))(keys)
    return drawn / jnp.sqrt(jnp.square(drawn).sum(1, keepdims=True))


def crf(image: Float[Array, "B H W 3"], features: Float[Array, "B H W n"], keys: Key[Array, " B"]) -> Float[Array, ""]:
    """Mean squared distance of the features of pairs of random points, weighted by how close these are and look."""
    height, width = image.shape[1:3]

    def one(image, features, key):
        place = jax.random.uniform(key, (2, POINTS))
        y, x = _indices(place[0], height), _indices(place[1], width)
        far = squares(jnp.stack([y / height, x / width], -1))
        unlike = squares(image[y, x])
        weight = W1 * jnp.exp(-far / (2 * ALPHA) - unlike / (2 * BETA)) + W2 * jnp.exp(-far / (2 * GAMMA))
        return (squares(features[y, x]) * weight).mean()

    return jax.vmap(one)(image, features, keys).mean()


def _indices(uniform: Float[Array, " n"], size: int) -> Int[Array, " n"]:
    return jnp.minimum((uniform * size).astype(jnp.int32), size - 1)


def squares(x: Float[Array, "n C"]) -> Float[Array, "n n"]:
    """Return the squared distances of all pairs."""
    products = jnp.einsum("ac,bc->ab", x, x, precision="highest")
    norms = jnp.square(x).sum(-1)
    return jnp.maximum(norms[:, None] + norms - 2 * products, 0)
