"""Upsamplers behind one interface: `method(image, features, size, values) -> features` at that size.

Most methods average values with weights that depend on the image and on the features but not on the values. So a linear
head may be applied before them, and the weights can be kept, see `evaluation.kept_weights`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

import anyup_jax
from anyup_core.geometry import AxisWindow, axis_window
from anyup_core.preprocessing import IMAGENET
from anyup_core.settings import require
from anyup_core.upsamplers.joint_bilateral import JointBilateralConfig
from anyup_jax import upsamplers
from anyup_jax.upsamplers.interpolation import resize
from anyup_jax.upsamplers.joint_bilateral import average, joint_bilateral
from anyup_jax.upsamplers.naf import NAF
from evaluation.config import EVERY, TRAINED, Config, Size

Guide = Float[Array, "B H W 3"] | Int[Array, "B H W 1"]
Maps = Mapping[str, tuple[Float[Array, "B h w C"], Float[Array, "B h w E"] | None]]


@runtime_checkable
class Method(Protocol):
    """An upsampler to evaluate.

    Attributes:
        name: its name on the command line.
        enlarge: how many times larger the image is that the encoder sees than for the other methods.
        guided_by: what it is given as `image`: "image", or "labels" (B, H, W, 1), integers from 0 to 255.
        linear: whether it averages values as described above; otherwise heads are applied to its output.
    """

    name: str
    enlarge: int = 1
    guided_by: str = "image"
    linear: bool = True

    def of(self, encoder: str) -> Method:
        """Return the method for the features of one of the encoders, by its name in the evaluation."""
        return self

    def __call__(
        self, image: Guide, features: Float[Array, "B h w C"], size: Size, values: Float[Array, "B h w E"] | None = None
    ) -> Float[Array, "B Ho Wo E"]:
        """Return the features, or `values` instead of them, at another size; the image has values in [0, 1]."""
        ...

    def upsample_many(self, image: Guide, maps: Maps, size: Size) -> dict[str, Float[Array, "B Ho Wo E"]]:
        """Return the output for each of several pairs of features and values of one image, by its name."""
        return {name: self(image, features, size, values) for name, (features, values) in maps.items()}

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow] | None:
        """Return which cells an output position averages; None where the weights do not depend on the image."""
        return None


def create(name: str, config: Config) -> Method:
    """Return a method by its name.

    Raises:
        ValueError, OSError, ConnectionError: if weights cannot be loaded, as `anyup_jax.from_pretrained` does; and
            ValueError for a model whose guidance is no photograph.
    """
    if name == "anyup":
        settings = config.anyup
        options = {key: value for key, value in dict(window=settings.window, ema=settings.ema).items() if value}
        model = anyup_jax.from_pretrained(settings.weights, dtype=jnp.dtype(settings.dtype), **options)
        remedy = f"its guidance has {model.config.input_dim} channels, and images here have 3"
        require(model.config.input_dim == 3, "anyup.weights", settings.weights, remedy)
        return Upsampler(model)
    if name in TRAINED:
        return Trained(name, load_trained(name, config))
    if name == "high_resolution":
        return Interpolation(name, "bilinear", config.high_resolution)
    guided = {method.name: method for method in (JointBilateral(), LabelGuided())}
    return guided.get(name) or Interpolation(name, name)


@dataclasses.dataclass(frozen=True)
class Interpolation(Method):
    """Separable interpolation with the conventions of PyTorch's `interpolate`, which the published tables use.

    Attributes:
        kernel: "nearest" (nearest-exact), "bilinear" or "bicubic" (a = -0.75), the last two without aligned corners.
    """

    name: str
    kernel: str
    enlarge: int = 1

    def __call__(self, image, features, size, values=None):
        return resize(features if values is None else values, size, self.kernel)


@dataclasses.dataclass(frozen=True)
class JointBilateral(Method):
    """Joint bilateral upsampling (Kopf et al., 2007), which needs no training; see `anyup_jax.upsamplers`."""

    name: ClassVar[str] = "joint_bilateral"
    config: JointBilateralConfig = dataclasses.field(default_factory=JointBilateralConfig)

    def __call__(self, image, features, size, values=None):
        return joint_bilateral(self.config, image, features if values is None else values, size)

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow]:
        return self.config.windows(cells, size)


@dataclasses.dataclass(frozen=True)
class LabelGuided(Method):
    """Upsampling with the labels known: an upper bound to compare with, not a method.

    A position averages the cells of AnyUp's window, each weighted by how many of its pixels have the position's label.
    So nothing is mixed across an edge that the cells do not mix already.

    Attributes:
        window_ratio: of the window, as in `AnyUpConfig`.
    """

    name: ClassVar[str] = "label_guided"
    guided_by: ClassVar[str] = "labels"
    window_ratio: float = 0.1

    def __call__(self, image, features, size, values=None):
        if image.shape[1:3] != size:
            raise ValueError(f"Labels of {image.shape[1:3]} cannot guide an output of {size}; give labels of its size.")
        return _label_guided(self, image[..., 0], features if values is None else values, size)

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow]:
        return tuple(axis_window(n, m, self.window_ratio, "paper") for n, m in zip(size, cells))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _label_guided(method, labels, values, size):
    batch, height, width, _ = values.shape
    rows, cols = (np.arange(n) * m // n for n, m in zip(size, (height, width)))
    images = jnp.arange(batch)[:, None, None]
    counts = jnp.zeros((batch, height, width, 256)).at[images, rows[:, None], cols, labels].add(1)
    return average(values, method.windows((height, width), size), lambda i, j: counts[images, i[:, None], j, labels])


def load_trained(name: str, config: Config) -> dict[str, upsamplers.Upsampler]:
    """Return another upsampler with the weights that an evaluation names for each encoder; equal ones are one model."""
    settings = config.upsamplers[name]
    weights = {encoder: settings.weights.get(encoder, settings.weights.get(EVERY)) for encoder in config.encoders}
    chosen = dict(num_heads=settings.num_heads, kernel_size=settings.kernel_size)
    given = {key: value for key, value in chosen.items() if value is not None}
    loaded = {source: upsamplers.from_pretrained(name, source, **given) for source in dict.fromkeys(weights.values())}
    return {encoder: loaded[source] for encoder, source in weights.items()}


@dataclasses.dataclass(frozen=True)
class Trained(Method):
    """Another upsampler, with weights for each encoder.

    Attributes:
        models: by the encoder's name in the evaluation.
        encoder: whose features are upsampled; None until `of` says so.
    """

    name: str
    models: Mapping[str, upsamplers.Upsampler]
    encoder: str | None = None
    linear: ClassVar[bool] = False

    def of(self, encoder: str) -> Trained:
        return dataclasses.replace(self, encoder=encoder)

    def check(self, encoder: str, channels: int) -> None:
        """Raise ValueError unless the weights of an encoder are for features of this width."""
        model = self.models[encoder]
        if model.channels not in (None, channels) or channels % model.multiple:
            fits = f"a multiple of {model.multiple}" if model.channels is None else str(model.channels)
            raise ValueError(
                f"{self.name} has weights for features of {fits} channels, {encoder} gives {channels}; name others, "
                f"upsamplers.{self.name}.weights.{encoder}=FILE, or leave the method out."
            )

    def __call__(self, image, features, size, values=None):
        assert values is None, "its output is not an average of values"
        model = self.models[self.encoder or ""]
        mean, std = (jnp.asarray(x, jnp.float32) for x in model.normalisation)
        return upsamplers.upsample(model, (image - mean) / std, features, tuple(size))

    def upsample_many(self, image, maps, size):
        """With one NAF, whose weights depend on the image alone, for all maps: side by side in each head's share."""
        models = [self.models[name] for name in maps]
        features = [x for x, _ in maps.values()]
        alike = all(model is models[0] for model in models) and len({x.shape[:3] for x in features}) == 1
        if not isinstance(models[0], NAF) or not alike:
            return {name: self.of(name)(image, x, size) for name, (x, _) in maps.items()}
        shares = [rearrange(x, "b h w (n c) -> b h w n c", n=models[0].multiple) for x in features]
        together = rearrange(jnp.concatenate(shares, -1), "b h w n c -> b h w (n c)")
        output = self.of(next(iter(maps)))(image, together, size)
        output = rearrange(output, "b h w (n c) -> b h w n c", n=models[0].multiple)
        parts = jnp.split(output, np.cumsum([x.shape[-1] for x in shares])[:-1], -1)
        return {name: rearrange(x, "b h w n c -> b h w (n c)") for name, x in zip(maps, parts)}


@dataclasses.dataclass(frozen=True)
class Upsampler(Method):
    """AnyUp."""

    name: ClassVar[str] = "anyup"
    model: anyup_jax.AnyUp

    def __call__(self, image, features, size, values=None):
        return anyup_jax.upsample(self.model, self._guidance(image), features, size, values=values)

    def upsample_many(self, image, maps, size):
        """Encode the image once for all maps."""
        features, values = zip(*maps.values())
        return dict(zip(maps, anyup_jax.upsample_many(self.model, self._guidance(image), features, size, None, values)))

    def _guidance(self, image):
        mean, std = (jnp.asarray(x, jnp.float32) for x in IMAGENET)
        return (image - mean) / std

    def windows(self, cells: Size, size: Size) -> tuple[AxisWindow, AxisWindow]:
        config = self.model.config
        return tuple(axis_window(n, m, config.window_ratio, config.window) for n, m in zip(size, cells))
