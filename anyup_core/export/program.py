"""What programs for one size are exported for, checked before anything is traced."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, SupportsIndex

from anyup_core.checks import OutputSize, is_whole, two_sides
from anyup_core.files import check_output
from anyup_core.settings import require

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of an image and of features.

    Attributes:
        batch: number of images; None for any.
        image: height and width.
        cells: height and width of the features.
        channels: of the features; None for any multiple of `multiple`.
        multiple: 1 for a model without heads that share the channels.
        output: height and width; None where the model decides.
    """

    batch: int | None
    image: tuple[int, int]
    cells: tuple[int, int]
    channels: int | None
    multiple: int
    output: tuple[int, int] | None


def check_program(
    model: Any,
    path: str | os.PathLike,
    suffixes: Sequence[str],
    image_size: OutputSize,
    features: Sequence[SupportsIndex],
    output_size: OutputSize | None,
    batch: int | None,
) -> Shapes:
    """Return the shapes of a program.

    Args:
        model: an upsampler, of which `channels` and `multiple` are read.
        path: of the file, which ends with one of the suffixes.
        suffixes: those of the framework.
        image_size, features, output_size, batch: as `export` received them.

    Raises:
        ValueError: for another suffix, and for sizes that are too small or do not fit the model.
        TypeError: for a model that is no upsampler, and for sizes that are not whole numbers or of another length.
        OSError: if the file cannot be written, as `files.check_output`.
    """
    if not all(hasattr(model, wanted) for wanted in ("channels", "multiple", "native_size")):
        raise TypeError(f"{type(model).__name__} cannot be exported; give AnyUp or one of the upsamplers.")
    check_output(path, suffixes)
    return check_shapes(model.channels, int(model.multiple), image_size, features, output_size, batch)


def check_shapes(
    channels: int | None,
    multiple: int,
    image_size: OutputSize,
    features: Sequence[SupportsIndex],
    output_size: OutputSize | None,
    batch: int | None,
) -> Shapes:
    """Return the shapes of a program for a model of these channels; arguments and errors are as of `check_program`."""
    sides = two_sides("image_size", image_size)
    grid: Any = tuple(features) if isinstance(features, Sequence) and not isinstance(features, str) else ()
    if len(grid) not in (2, 3) or not all(map(is_whole, grid)):
        raise TypeError(f"features={features!r} must be whole numbers: height and width in cells, and channels.")
    require(min(map(int, grid)) >= 1, "features", features, "give numbers of at least 1")
    require(batch is None or (is_whole(batch) and batch >= 1), "batch", batch, "give a number of images, None for any")
    if len(grid) == 3:
        fits = int(grid[2]) % multiple == 0 if channels is None else int(grid[2]) == channels
        wanted = f"a multiple of {multiple}" if channels is None else f"the {channels} that the weights are for"
        require(fits, "features", features, f"the channels must be {wanted}")
    output = None if output_size is None else two_sides("output_size", output_size)
    whole = None if batch is None else int(batch)
    return Shapes(whole, sides, (int(grid[0]), int(grid[1])), channels, multiple, output)


def check_precision(dtype: Any, allowed: Sequence[str] = PRECISIONS) -> str:
    """Return the name of a type; ValueError unless it is one that models compute in."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")
    require(name in allowed, "dtype", dtype, f"models compute in {', '.join(allowed)}")
    return name
