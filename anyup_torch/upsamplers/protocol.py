"""What every upsampler offers, and what those of this package share."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core import checks
from anyup_core.checks import OutputSize
from anyup_core.preprocessing import Preprocessing
from anyup_core.upsamplers.config import UpsamplerConfig
from anyup_torch.anatomy import Part, anatomy
from anyup_torch.image_code import Size


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
        """Return height and width of the output where no other is asked for; both are tensors, NCHW."""
        ...

    def __call__(
        self, image: Any, features: Any, output_size: OutputSize | None = None, q_chunk_size: int | None = None
    ) -> Any:
        """Return the upsampled features."""
        ...


class ConfiguredUpsampler(nn.Module):
    """An upsampler described by its settings; subclasses name the class of these and compute `upsample`.

    Args:
        config: the settings; the default ones if None.
        fields: fields of the settings that differ from these.

    Raises:
        TypeError: for fields that do not exist.
        ValueError: for settings no model can have.
    """

    settings: ClassVar[type[UpsamplerConfig]]
    image_dtype: ClassVar[torch.dtype | None] = None  # of the image, where it is not that of the parameters
    made_of: dict[str, Part]

    def __init__(self, config: UpsamplerConfig | None = None, **fields: Any):
        super().__init__()
        self.config: Any = (self.settings() if config is None else config).replace(**fields)

    @property
    def channels(self) -> int | None:
        return self.config.width

    @property
    def multiple(self) -> int:
        return self.config.multiple

    @property
    def normalisation(self) -> Preprocessing:
        return self.config.normalisation

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the parameters and so of the computation; None without parameters."""
        return next((tensor.dtype for tensor in self.parameters()), None)

    @property
    def changed(self) -> bool:
        """Whether submodules have been replaced, hooked or parametrised since the model was made."""
        return anatomy(self) != self.made_of

    def native_size(self, image: Tensor, features: Tensor) -> Size:
        return self.config.native_size(tuple(image.shape[2:]), tuple(features.shape[2:]))

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"],
        features: Float[Tensor, "B C h w"],
        output_size: OutputSize | None = None,
        q_chunk_size: int | None = None,
    ) -> Float[Tensor, "B C Ho Wo"]:
        """Return the features upsampled to `output_size` (default: `native_size`), in their own type.

        Args:
            image: guidance, normalised with `normalisation`.
            features: the encoder's feature map of the same view.
            output_size: height and width of the output; or one number for both.
            q_chunk_size: output positions worked on at once; bounds memory, never changes the result.

        The output's memory may be in channels-last order; its shape is NCHW as always.

        Raises:
            ValueError, TypeError: for shapes, types or sizes that do not fit; the message says what would.
        """
        size = checks.check_upsampler(self.config, "NCHW", image, features, output_size, q_chunk_size)
        dtype = self.dtype or torch.promote_types(features.dtype, torch.float32)
        chunk = None if q_chunk_size is None else int(q_chunk_size)
        return self.upsample(image.to(self.image_dtype or dtype), features.to(dtype), size, chunk).to(features.dtype)

    def upsample(
        self, image: Float[Tensor, "B 3 H W"], features: Float[Tensor, "B C h w"], size: Size, q_chunk_size: int | None
    ) -> Float[Tensor, "B C Ho Wo"]:
        """Compute `forward` for inputs that have been checked."""
        raise NotImplementedError


def differentiated(model: nn.Module, *tensors: Tensor) -> bool:
    """Whether autograd has to follow what a model does with these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in itertools.chain(tensors, model.parameters()))
