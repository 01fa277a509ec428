"""A backbone as a frozen function from an image to its feature map."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core.encoders.catalogue import Published
from anyup_core.encoders.frozen import EncoderSizes
from anyup_jax.promotion import standard_promotion


class Encoder(EncoderSizes, nnx.Module):
    """A frozen backbone: no gradient passes through it, and its features have the type `dtype`.

    Args:
        backbone: a module with `config` and `intermediates(image, layers, norm)`.
        published: name and preprocessing.
        layer, norm, class_token, dtype: as for `encoders.create`.

    Attributes:
        name: timm's name.
        stride: pixels per feature cell along either axis; `patch_size` is the same number.
        channels: channels C of the features.
        widths: channels of each layer, whose sum is C.
        prefix_tokens: number of class and register tokens of the backbone, which the features do not contain.
        mean, std: the encoder's own normalisation, per RGB channel of an image in [0, 1].
    """

    def __init__(
        self,
        backbone: nnx.Module,
        published: Published,
        *,
        layer: int | tuple[int, ...] = -1,
        norm: bool = True,
        class_token: bool = False,
        dtype: DTypeLike = jnp.float32,
    ):
        config = published.config
        self.backbone = backbone
        self.choose_layers(published.name, layer, config.strides, config.widths)
        self.prefix_tokens = config.prefix_tokens
        self.mean, self.std = published.mean, published.std
        self.norm, self.class_token = norm, class_token
        self.dtype = jnp.dtype(dtype)
        if class_token and not config.class_tokens:
            raise ValueError(f"{self.name} has no class token; leave class_token out.")

    @standard_promotion()
    def normalize(self, image: Float[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Return an image with values in [0, 1], normalised as in training. Raises TypeError for integers."""
        image = jnp.asarray(image)
        self.check_type(image)
        return (image - jnp.asarray(self.mean, image.dtype)) / jnp.asarray(self.std, image.dtype)

    def __call__(
        self, image: Float[Array | np.ndarray, "B H W 3"]
    ) -> Float[Array, "B h w C"] | tuple[Float[Array, "B h w C"], Float[Array, "B C"]]:
        """Return the features of a normalised image, h = H // stride, w = W // stride; and its class token on request.

        An image whose sides are no multiple of the stride is padded on the right and at the bottom with zeros (the
        encoder's mean colour); cells that lie partly on the padding are cropped away again, see `covered`. The
        call runs as one compiled program, also outside of `jax.jit`.

        Raises:
            TypeError: if the image is not floating point.
            ValueError: if its shape is not (B, H, W, 3) or a side is shorter than the stride.
        """
        self.check_image(image)
        graph, state = nnx.split(self)
        return _run(graph, state, image)

    def encode_array(self, image: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w C"]:
        """Return the features of one image with values in [0, 1], from numpy to numpy, normalised on the way."""
        features = self(self.normalize(jnp.asarray(image, jnp.float32)[None]))
        features = features[0] if self.class_token else features
        return np.asarray(features[0], np.float32)

    def _encode(self, image):
        height, width = image.shape[1:3]
        edges = ((0, 0), (0, -height % self.stride), (0, -width % self.stride), (0, 0))
        layers = tuple(sorted(set(self.layers)))
        padded = jnp.pad(image.astype(self.dtype), edges)
        exact = self.dtype == jnp.float32  # float32 products on every platform
        with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
            by_layer = dict(zip(layers, self.backbone.intermediates(padded, layers, self.norm)))
        maps = jnp.concatenate([by_layer[i][0] for i in self.layers], -1)
        maps = maps[:, : height // self.stride, : width // self.stride]
        if not self.class_token:
            return maps
        return maps, jnp.concatenate([by_layer[i][1][:, 0] for i in self.layers], -1)


@functools.partial(jax.jit, static_argnums=0)
@standard_promotion()
def _run(graph, state, image):
    state, image = jax.lax.stop_gradient((state, image))  # before the backbone, so that it is never differentiated
    return nnx.merge(graph, state)._encode(image)
