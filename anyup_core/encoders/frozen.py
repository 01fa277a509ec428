"""What training and evaluation need of an encoder, in whichever framework it runs, and what all encoders share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from anyup_core.checks import expected_axes

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


class EncoderSizes:
    """The layers of an encoder whose outputs are its features, and the images that it takes."""

    layout: Literal["NHWC", "NCHW"] = "NHWC"

    def choose_layers(
        self, name: str, layer: int | tuple[int, ...], strides: Sequence[int], widths: Sequence[int]
    ) -> None:
        """Set `name`, `layers` as indices from 0, their `stride`, their `widths` and the sum of these, `channels`.

        Args:
            name, layer: as given to `create`.
            strides, widths: of every layer of the model.

        Raises:
            ValueError: for a layer that the model does not have, and if the strides differ: only equal grids are
                concatenated.
        """
        layers, count = (layer,) if isinstance(layer, int) else tuple(layer), len(strides)
        if not layers or any(not -count <= i < count for i in layers):
            raise ValueError(
                f"{name} has {count} layers; layer={layer!r} must be one or several of {-count} to {count - 1}."
            )
        self.name, self.layers = name, tuple(i % count for i in layers)
        if len({strides[i] for i in layers}) > 1:
            listed = ", ".join(f"layer {i}: {strides[i]}" for i in self.layers)
            raise ValueError(
                f"The layers chosen of {name} have different strides ({listed}); only equal grids can be concatenated."
            )
        self.stride: int = strides[layers[0]]
        self.widths = tuple(widths[i] for i in layers)
        self.channels = sum(self.widths)

    @property
    def patch_size(self) -> int:
        """The stride, under the name it has in vision transformers."""
        return self.stride

    def covered(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width in pixels of the part of an image of this size that the features cover.

        Where this part is smaller than the image, crop the guidance to it (from the top left), so that both line up.
        """
        return height // self.stride * self.stride, width // self.stride * self.stride

    def check_type(self, image: Any) -> None:
        """Raise TypeError unless the image is floating point."""
        if "float" not in str(image.dtype):
            raise TypeError(
                f"The image has type {image.dtype}; give floating point, scaled to [0, 1] and then normalised "
                "with encoder.normalize(image)."
            )

    def check_image(self, image: Any) -> None:
        """Raise TypeError unless the image is floating point, ValueError for another shape or too small a size."""
        self.check_type(image)
        shape = tuple(image.shape)
        if len(shape) != 4 or shape[self.layout.index("C")] != 3:
            raise ValueError(f"The image has shape {shape}; {expected_axes(self.layout, shape, 3)}")
        height, width = (shape[self.layout.index(axis)] for axis in "HW")
        if min(height, width) < self.stride:
            raise ValueError(
                f"The image is {height} x {width} pixels, smaller than one {self.stride} x {self.stride} cell of "
                f"{self.name}; resize it to at least that."
            )
