"""What training and evaluation need of an encoder, in whichever framework it runs."""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

Images = TypeVar("Images")


@runtime_checkable
class FrozenEncoder(Protocol[Images]):
    """A backbone as a function from images to feature maps; no gradient passes through it.

    `anyup_jax.encoders.Encoder` and the timm bridge take and return JAX arrays with the channels last,
    `anyup_torch.encoders.Encoder` takes and returns tensors with the channels first.

    Attributes:
        name: the name it was created by.
        stride: pixels per feature cell along either axis.
        channels: channels of the features.
        widths: channels of each layer, whose sum is `channels`.
    """

    name: str
    stride: int
    channels: int
    widths: tuple[int, ...]

    def normalize(self, image: Images) -> Images:
        """Return images with values in [0, 1] as the encoder was trained to see them."""
        ...

    def __call__(self, image: Images) -> Images | tuple[Images, Images]:
        """Return the features of normalised images; (features, class token) if it was created with `class_token`."""
        ...
