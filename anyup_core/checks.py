"""What AnyUp accepts."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

from anyup_core.config import AnyUpConfig
from anyup_core.geometry import AxisWindow
from anyup_core.settings import require
from anyup_core.upsamplers.config import UpsamplerConfig

OutputSize = SupportsIndex | Sequence[SupportsIndex]  # of a square, or height and width
ORDERS = {"NHWC": (0, 2, 3, 1), "NCHW": (0, 3, 1, 2)}  # how to transpose the other order into this one


def check_inputs(
    config: AnyUpConfig | UpsamplerConfig,
    layout: str,
    image: Any,
    features: Any,
    output_size: OutputSize | None,
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
        TypeError: for integer inputs, inputs that are no arrays (tensors), or sizes that are not whole numbers.
    """
    height, width, channels = (layout.index(letter) for letter in "HWC")
    given = {"image": image, "features": features} | ({} if values is None else {"values": values})
    for name, array in given.items():
        check_kind(name, array, layout)
        if len(array.shape) != 4 or 0 in array.shape:
            hint = _token_hint(layout) if name != "image" and len(array.shape) == 3 else ""
            raise ValueError(
                f"{name} has shape {tuple(array.shape)}; it must have four axes, {layout}, none of them empty.{hint}"
            )
        if "float" not in type_name(array):
            hint = "divide by 255, apply the ImageNet mean and standard deviation" if name == "image" else "convert it"
            raise TypeError(f"{name} holds {type_name(array)}; it must hold floating-point numbers: {hint} first.")
    shape, cells = tuple(image.shape), tuple(features.shape)
    if shape[channels] != config.input_dim:
        raise ValueError(f"image has shape {shape}; {expected_axes(layout, shape, config.input_dim)}")
    if shape[0] != cells[0]:
        raise ValueError(f"image {shape}, features {cells} differ in the batch size; give one feature map per image.")
    if _looks_transposed(cells, (shape[height], shape[width]), layout):
        warnings.warn(
            f"features of shape {cells} do not have the proportions of the image {shape}, but would with the channels "
            f"on another axis; {layout} is expected: transpose by {ORDERS[layout]} unless they are as they should be.",
            stacklevel=3,
        )
    if values is not None and any(values.shape[axis] != cells[axis] for axis in range(4) if axis != channels):
        raise ValueError(
            f"values {tuple(values.shape)} must share batch, height and width with the features {cells}; "
            "only the channels may differ."
        )
    positive = q_chunk_size is None or (is_whole(q_chunk_size) and q_chunk_size >= 1)
    require(positive, "q_chunk_size", q_chunk_size, "give a whole number of at least 1, or None: the backend chooses")
    return _size(output_size, (shape[height], shape[width]))


def check_upsampler(
    config: UpsamplerConfig,
    layout: str,
    image: Any,
    features: Any,
    output_size: OutputSize | None,
    q_chunk_size: int | None,
) -> tuple[int, int]:
    """Refuse what an upsampler cannot handle and return the output's height and width.

    Args:
        config: of the upsampler.
        layout, image, features, output_size, q_chunk_size: as for `check_inputs`.

    Raises:
        ValueError, TypeError: as `check_inputs`, and ValueError for features that are not as wide as the weights are
            for, and for sizes the method cannot handle.
    """
    asked = check_inputs(config, layout, image, features, output_size, q_chunk_size, None)
    name, shape = type(config).__name__.removesuffix("Config"), tuple(features.shape)
    height, width, channels = (layout.index(letter) for letter in "HWC")
    if config.width not in (None, shape[channels]):
        raise ValueError(
            f"features {shape} have {shape[channels]} channels, and this {name} was trained for {config.width}, which "
            "cannot be changed; give features of that encoder, or weights for this one."
        )
    if shape[channels] % config.multiple:
        raise ValueError(
            f"features {shape} have {shape[channels]} channels; {name} needs a multiple of {config.multiple}, a share "
            "for each of its heads."
        )
    sides = (int(image.shape[height]), int(image.shape[width])), (shape[height], shape[width])
    size = config.native_size(*sides) if output_size is None else asked
    config.check(*sides, size)
    return size


def check_maps(
    config: AnyUpConfig,
    layout: str,
    image: Any,
    features: Any,
    output_size: OutputSize | None,
    q_chunk_size: int | None,
    values: Any,
) -> tuple[int, int]:
    """Do the same as `check_inputs` for a list of feature maps of one image; an entry of `values` may be None.

    Raises:
        ValueError, TypeError: as `check_inputs`, naming the map; and unless both are lists of one length, not empty.
    """
    values = [None] * len(features) if values is None and isinstance(features, list | tuple) else values
    for name, maps in (("features", features), ("values", values)):
        if not isinstance(maps, list | tuple):
            raise TypeError(f"{name} is a {type(maps).__name__}; give a list with one entry for each feature map.")
    if not features:
        raise ValueError("features is an empty list; give at least one feature map.")
    if len(values) != len(features):
        raise ValueError(f"values has {len(values)} entries for {len(features)} feature maps; give one for each map.")
    for index, maps in enumerate(zip(features, values)):
        try:
            size = check_inputs(config, layout, image, maps[0], output_size, q_chunk_size, maps[1])
        except (TypeError, ValueError) as error:
            raise type(error)(f"Feature map {index}: {error}") from None
    return size


def check_attention(
    query: Any, key: Any, values: Any, rows: AxisWindow, cols: AxisWindow, q_chunk_size: int | None, strips: int = 1
) -> int | None:
    """Refuse what window attention cannot compute and return the chunk size as an `int`; the channels come last.

    `query` holds one of `strips` equal strips of the rows that `rows` describes.

    Raises:
        ValueError: for a chunk size below 1, or shapes that do not fit the windows.
    """
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, values {tuple(values.shape)}"
    sizes = strips * query.shape[1], query.shape[2], *key.shape[1:3]
    if (rows.queries, cols.queries, rows.keys, cols.keys) != sizes:
        raise ValueError(
            f"Windows of {rows.queries} x {cols.queries} queries over {rows.keys} x {cols.keys} keys "
            f"do not fit {shapes}."
        )
    if key.shape[:3] != values.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"Queries and keys must share batch and channels, keys and values batch and positions; got {shapes}."
        )
    if q_chunk_size is not None and q_chunk_size < 1:
        raise ValueError(f"q_chunk_size={q_chunk_size} must be at least 1, or None to let the backend choose.")
    return None if q_chunk_size is None else int(q_chunk_size)


def check_shares(values: Any, num_heads: int) -> None:
    """Raise ValueError unless heads can share the channels of values, the last axis, equally."""
    if values.shape[-1] % num_heads:
        raise ValueError(f"{values.shape[-1]} value channels cannot be shared among num_heads={num_heads}.")


def check_model(config: AnyUpConfig) -> None:
    """Raise ValueError if a model's parameters, in float32, do not fit in the memory of the machine."""
    widths = f"qk_dim={config.qk_dim}, lfu_dim={config.filters}, input_dim={config.input_dim}"
    kernels = f"kernel_size={config.kernel_size}, kernel_size_lfu={config.kernel_size_lfu}"
    check_memory(f"A model with {widths}, {kernels}", 4 * config.parameters)


def check_memory(what: str, needed: int) -> None:
    """Raise ValueError if `what`, a setting or an option, takes more bytes than the machine has memory."""
    memory = physical_memory()
    if needed > memory:
        raise ValueError(
            f"{what} takes {needed / 1e9:,.0f} GB, but the machine has {memory / 1e9:,.0f} GB of memory; make it "
            "smaller."
        )


def physical_memory() -> float:
    """Return the machine's memory in bytes; infinity on a platform that does not tell."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def encoded(maps: Mapping[tuple[int, int], Any], size: tuple[int, int], argument: str) -> Any:
    """Return the map of a size; ValueError if `argument` was given to `encode_image` without it."""
    if size not in maps:
        raise ValueError(f"The image was encoded for {argument}={list(maps)}; pass {size} to encode_image as well.")
    return maps[size]


def check_kind(name: str, array: Any, layout: str) -> None:
    """Raise TypeError unless it is what the framework with this layout computes with: NHWC is JAX, NCHW PyTorch."""
    is_array, is_tensor = hasattr(array, "shape") and hasattr(array, "dtype"), hasattr(array, "requires_grad")
    kind = f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}".removeprefix("builtins.")
    if layout == "NCHW" and not is_tensor:
        raise TypeError(f"{name} is a {kind}; give a torch.Tensor, {layout}: torch.from_numpy(numpy.asarray(...)).")
    if layout == "NHWC" and (is_tensor or not is_array):
        change = "tensor.detach().cpu().numpy(), channels last" if is_tensor else "numpy.asarray(...)"
        raise TypeError(f"{name} is a {kind}; give a JAX or NumPy array, {layout}: {change}.")
    if layout == "NHWC" and type_name(array) in ("float96", "float128"):
        raise TypeError(f"{name} holds {type_name(array)}, which JAX does not have; convert it to float32.")


def _token_hint(layout: str) -> str:
    package = "anyup_jax" if layout == "NHWC" else "anyup_torch"
    return f" Tokens (B, N, C) of a vision transformer become a map with {package}.tokens_to_map."


def type_name(array: Any) -> str:
    """Return the name of the number type of an array or a tensor, whatever its byte order."""
    return getattr(array.dtype, "name", str(array.dtype))


def _size(output_size: OutputSize | None, default: tuple[int, int]) -> tuple[int, int]:
    if output_size is None:
        return int(default[0]), int(default[1])
    return two_sides("output_size", output_size, "; leave it out for the image's size")


def two_sides(name: str, size: OutputSize, remedy: str = "") -> tuple[int, int]:
    """Return height and width, given as two whole numbers or as one, of a square; TypeError, ValueError otherwise."""
    sides: Any = (size, size) if is_whole(size) else size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(map(is_whole, sides)):
        raise TypeError(f"{name}={size!r} must be a whole number, or two: height and width.")
    if min(sides) < 1:
        raise ValueError(f"{name}={tuple(sides)} must be at least 1 x 1{remedy}.")
    return int(sides[0]), int(sides[1])


def expected_axes(layout: str, shape: tuple[int, ...], channels: int) -> str:
    """Return what an image must be, and how to transpose one of this shape that has its channels on another axis."""
    other = len(shape) == 4 and shape[4 - layout.index("C")] == channels
    hint = f" The channels seem to be on another axis: transpose by {ORDERS[layout]}." if other else ""
    return f"{layout} with {channels} channels is expected.{hint}"


def is_whole(number: Any) -> bool:
    return hasattr(number, "__index__") and not isinstance(number, bool)


def _looks_transposed(shape: tuple[Any, ...], image: tuple[Any, Any], layout: str) -> bool:
    """Whether a map is far from the image's height / width, but close to it when read in the other axis order."""
    if not all(
        isinstance(side, int) for side in (*shape[1:], *image)
    ):  # sizes without a number, of a program for any size
        return False
    aspect = image[0] / image[1]
    first, last = (max(ratio / aspect, aspect / ratio) for ratio in (shape[1] / shape[2], shape[2] / shape[3]))
    off, other = (first, last) if layout == "NHWC" else (last, first)
    return off >= 4 and other <= 1.1
