"""What every upsampler offers, and what those of this package share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from anyup_core import checks
from anyup_core.checks import OutputSize
from anyup_core.preprocessing import Preprocessing
from anyup_core.upsamplers.config import UpsamplerConfig
from anyup_jax.image_code import native
from anyup_jax.promotion import standard_promotion
from anyup_jax.row_shards import Size


@runtime_checkable
class Upsampler(Protocol):
    """A model that makes a feature map larger, guided by the image.

    Attributes:
        channels: of the features it was trained for; None if any.
        multiple: what the number of channels of the features has to be a multiple of.
        normalisation: mean and standard deviation that the image, in [0, 1], is normalised with.
    """

    @property
    def channels(self) -> int | None: ...

    @property
    def multiple(self) -> int: ...

    @property
    def normalisation(self) -> Preprocessing: ...

    def native_size(self, image: Any, features: Any) -> Size:
        """Return height and width of the output where no other is asked for; both are arrays, NHWC."""
        ...

    def __call__(
        self, image: Any, features: Any, output_size: OutputSize | None = None, q_chunk_size: int | None = None
    ) -> Any:
        """Return the upsampled features."""
        ...


class ConfiguredUpsampler(nnx.Module):
    """An upsampler described by its settings; subclasses name the class of these and compute `upsample`.

    Args:
        config: the settings; the default ones if None.
        dtype: type of the computation, float32 or bfloat16; parameters are float32 either way.
        fields: fields of the settings that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings: ClassVar[type[UpsamplerConfig]]
    one_by_one: ClassVar[bool] = False  # whether a program for any number of images upsamples one after the other

    def __init__(self, config: UpsamplerConfig | None = None, dtype: DTypeLike = jnp.float32, **fields: Any):
        self.config: Any = (self.settings() if config is None else config).replace(**fields)
        self.dtype = dtype

    @property
    def channels(self) -> int | None:
        return self.config.width

    @property
    def multiple(self) -> int:
        return self.config.multiple

    @property
    def normalisation(self) -> Preprocessing:
        return self.config.normalisation

    def native_size(self, image: Any, features: Any) -> Size:
        return self.config.native_size(tuple(image.shape[1:3]), tuple(features.shape[1:3]))

    @standard_promotion()
    def __call__(
        self,
        image: Float[Array | np.ndarray, "B H W 3"],
        features: Float[Array | np.ndarray, "B h w C"],
        output_size: OutputSize | None = None,
        q_chunk_size: int | None = None,
    ) -> Float[Array, "B Ho Wo C"]:
        """Return the features upsampled to `output_size` (default: `native_size`), in their own type.

        Args:
            image: guidance, normalised with `normalisation`.
            features: the encoder's feature map of the same view.
            output_size: height and width of the output; or one number for both.
            q_chunk_size: output positions worked on at once; bounds memory, never changes the result.

        Raises:
            ValueError, TypeError: for shapes, types or sizes that do not fit; the message says what would.
        """
        size = checks.check_upsampler(self.config, "NHWC", image, features, output_size, q_chunk_size)
        image, features = native((image, features))
        image, features = jnp.asarray(image), jnp.asarray(features)
        if self.one_by_one:
            output = image_by_image(lambda x, y: self.upsample(x, y, size, q_chunk_size), image, features)
        else:
            output = self.upsample(image, features, size, q_chunk_size)
        return output.astype(features.dtype)

    def upsample(
        self, image: Float[Array, "B H W 3"], features: Float[Array, "B h w C"], size: Size, q_chunk_size: int | None
    ) -> Float[Array, "B Ho Wo C"]:
        """Compute `__call__` for inputs that have been checked."""
        raise NotImplementedError


def image_by_image(function: Callable[..., Array], *arrays: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Call a function of batches; in a program for any number of images, with one image after the other."""
    if isinstance(arrays[0].shape[0], int):
        return function(*arrays)
    return jax.lax.map(lambda one: function(*(x[None] for x in one))[0], arrays)


def upsample(
    model: Any,
    image: Float[Array | np.ndarray, "B H W 3"],
    features: Float[Array | np.ndarray, "B h w C"],
    output_size: OutputSize | None = None,
    q_chunk_size: int | None = None,
) -> Float[Array, "B Ho Wo C"]:
    """Call an upsampler as one compiled program, compiled once per set of shapes; arguments as for its `__call__`.

    Raises:
        ValueError, TypeError: for shapes, types or sizes that do not fit.
    """
    size = model.native_size(image, features) if output_size is None else output_size
    two_sides = checks.two_sides("output_size", size)
    graph, state = nnx.split(model)
    return _compiled(graph, state, *native((image, features)), two_sides, q_chunk_size)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _compiled(graph, state, image, features, size, q_chunk_size):
    return nnx.merge(graph, state)(image, features, size, q_chunk_size)
