"""What AnyUp accepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyup_core.config import AnyUpConfig

ORDERS = {"NHWC": (0, 2, 3, 1), "NCHW": (0, 3, 1, 2)}  # how to transpose the other order into this one


def check_inputs(
    config: AnyUpConfig,
    layout: str,
    image: Any,
    features: Any,
    output_size: Sequence[int] | None,
    q_chunk_size: int | None,
    values: Any,
) -> tuple[int, int]:
    """Refuse what the model cannot upsample and return the output's height and width.

    Args:
        config: the model's configuration.
        layout: "NHWC" or "NCHW", the order of the axes.
        image, features, values: arrays or tensors, of which the shape and the type are read; `values` may be None.
        output_size, q_chunk_size: as the model received them.

    Raises:
        ValueError: for shapes, sizes or a chunk that do not fit.
        TypeError: for integer inputs or sizes that are not whole numbers.
    """
    height, width, channels = (layout.index(letter) for letter in "HWC")
    given = {"image": image, "features": features} | ({} if values is None else {"values": values})
    for name, array in given.items():
        if len(array.shape) != 4 or 0 in array.shape:
            raise ValueError(
                f"{name} has shape {tuple(array.shape)}; it must have four axes, {layout}, none of them empty."
            )
        if "float" not in str(array.dtype):
            hint = (
                "divide by 255 and apply the ImageNet mean and standard deviation" if name == "image" else "convert it"
            )
            raise TypeError(f"{name} holds {array.dtype}; it must hold floating-point numbers: {hint} first.")
    shape, cells = tuple(image.shape), tuple(features.shape)
    if shape[channels] != config.input_dim:
        hint = ""
        if shape[1 if layout == "NHWC" else 3] == config.input_dim:
            hint = f" The channels seem to be on another axis: transpose by {ORDERS[layout]}."
        raise ValueError(f"image has shape {shape}; {layout} with {config.input_dim} channels is expected.{hint}")
    if shape[0] != cells[0]:
        raise ValueError(
            f"image {shape} and features {cells} differ in the batch size; give one feature map per image."
        )
    if _looks_transposed(cells, shape[height] / shape[width], layout):
        raise ValueError(
            f"features of shape {cells} do not have the proportions of the image {shape}, but would with the channels "
            f"on another axis; {layout} is expected: transpose by {ORDERS[layout]}."
        )
    if values is not None:
        expected = [values.shape[axis] if axis == channels else cells[axis] for axis in range(4)]
        if tuple(values.shape) != tuple(expected):
            raise ValueError(
                f"values {tuple(values.shape)} must share batch, height and width with the features {cells}; "
                "only the channels may differ."
            )
    if q_chunk_size is not None and (not _whole(q_chunk_size) or q_chunk_size < 1):
        raise ValueError(
            f"q_chunk_size={q_chunk_size!r} must be a whole number of at least 1, or None to let the backend choose."
        )
    return _size(output_size, (shape[height], shape[width]))


def check_maps(
    config: AnyUpConfig,
    layout: str,
    image: Any,
    features: Any,
    output_size: Sequence[int] | None,
    q_chunk_size: int | None,
    values: Any,
) -> tuple[int, int]:
    """Do the same as `check_inputs` for a list of feature maps of one image; an entry of `values` may be None.

    Raises:
        ValueError, TypeError: as `check_inputs`, naming the map; for what is no list, is empty or has another length.
    """
    for name, maps in (("features", features), ("values", values)):
        if not isinstance(maps, (list, tuple)) and not (name == "values" and maps is None):
            raise TypeError(f"{name} is a {type(maps).__name__}; give a list with one entry for each feature map.")
    if not features:
        raise ValueError("features is an empty list; give at least one feature map.")
    if values is not None and len(values) != len(features):
        raise ValueError(f"values has {len(values)} entries for {len(features)} feature maps; give one for each map.")
    for index, maps in enumerate(features):
        try:
            chosen = None if values is None else values[index]
            size = check_inputs(config, layout, image, maps, output_size, q_chunk_size, chosen)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Feature map {index}: {error}") from None
    return size


def _size(output_size: Sequence[int] | None, default: tuple[int, int]) -> tuple[int, int]:
    if output_size is None:
        return default
    if not isinstance(output_size, Sequence) or len(output_size) != 2 or not all(map(_whole, output_size)):
        raise TypeError(f"output_size={output_size!r} must be two whole numbers, height and width.")
    if min(output_size) < 1:
        raise ValueError(f"output_size={tuple(output_size)} must be at least 1 x 1; leave it out for the image's size.")
    return int(output_size[0]), int(output_size[1])


def _whole(number: Any) -> bool:
    return hasattr(number, "__index__") and not isinstance(number, bool)


def _looks_transposed(shape: tuple[int, ...], aspect: float, layout: str) -> bool:
    """Whether a map is far from the image's height / width, but close to it when read in the other axis order."""
    here, there = (
        (shape[1] / shape[2], shape[2] / shape[3]) if layout == "NHWC" else (shape[2] / shape[3], shape[1] / shape[2])
    )
    off, other = (max(ratio / aspect, aspect / ratio) for ratio in (here, there))
    return off >= 4 and other <= 1.1
