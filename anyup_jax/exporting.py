"""Programs of `jax.export`: files that run on several platforms without this package."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export as jax_export
from jax.typing import DTypeLike
from jaxtyping import Array

from anyup_core.checks import OutputSize
from anyup_core.export.program import Shapes, check_precision, check_program
from anyup_core.replacement import replacing

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
PRECISIONS = ("float32", "bfloat16")


def export(
    model: Any,
    path: str | os.PathLike,
    *,
    image_size: OutputSize,
    features: Sequence[SupportsIndex],
    output_size: OutputSize | None = None,
    batch: int | None = None,
    dtype: DTypeLike | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Path:
    """Write an upsampler as a program of image and features, for images, features and outputs of one size.

    `load_exported("F.stablehlo")(image, features)` runs it, NHWC; without this package
    `jax.export.deserialize(bytearray(Path("F.stablehlo").read_bytes())).call(image, features)` does. The parameters are
    in it, and for TPUs the kernels of this package. Image, features and output are float32.

    In a program for any number of images AnyUp, JAFAR, LoftUp and NAF upsample one after the other, in the memory of
    one; the other upsamplers take all at once.

    Args:
        model: AnyUp, or one of `upsamplers`.
        path: of the file, which is replaced; `.stablehlo`.
        image_size: height and width of the image, or one number for both.
        features: height and width of the features in cells; channels may follow, but where the model takes any number
            of them the program does too (NAF: multiples of 4).
        output_size: height and width of the output; None for the model's `native_size`.
        batch: number of images; None for any number.
        dtype: type of the computation, float32 or bfloat16; None for the model's own. Parameters are float32.
        platforms: those that the program is for; JAX's names of them.

    Returns:
        The path.

    Raises:
        ValueError, TypeError: for another suffix, and for sizes, a type or platforms that do not fit.
        OSError: if the file cannot be written.
        ImportError: if the package flatbuffers is not installed.
    """
    shapes = check_program(model, path, (SUFFIX,), image_size, features, output_size, batch)
    names = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    if not names or not set(names) <= {*PLATFORMS, "rocm"}:
        raise ValueError(f"platforms={platforms!r} cannot be: give some of {', '.join(PLATFORMS)}, rocm.")
    precision = None if dtype is None else check_precision(jnp.dtype(dtype), PRECISIONS)
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError('Programs are written with flatbuffers: pip install "anyup-jax[export]".')
    data = trace(model, shapes, precision, names).serialize()
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def trace(
    model: Any, shapes: Shapes, dtype: str | None = None, platforms: Sequence[str] = PLATFORMS
) -> jax_export.Exported:
    """Return the program of a model, which computes in `dtype` (default: its own).

    Raises:
        ValueError: for sizes that the model cannot handle.
    """
    if dtype is not None:
        model = of_precision(model, dtype)
    width = shapes.channels or ("channels" if shapes.multiple == 1 else f"{shapes.multiple}*share")
    batch, channels = jax_export.symbolic_shape(f"{shapes.batch or 'batch'}, {width}")
    sides = (batch, *shapes.image, model.config.input_dim), (batch, *shapes.cells, channels)
    inputs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sides)

    def upsample(image, features):
        return model(image, features, shapes.output)

    with _without_folders():
        return jax_export.export(jax.jit(upsample), platforms=tuple(platforms))(*inputs)


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Let programs name the files of their operations without the folders, which are this machine's."""
    option = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, option)
    jax.config.update(option, ".*/")
    try:
        yield
    finally:
        jax.config.update(option, before)


def of_precision(model: Any, dtype: str) -> Any:
    """Return a copy of a model, of the same parameters, that computes in another type."""
    model = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(model):
        if not isinstance(module, nnx.LayerNorm) and hasattr(module, "dtype"):  # a norm has its input's type
            setattr(module, "dtype", jnp.dtype(dtype))  # noqa: B010
    return model


def load_exported(path: str | os.PathLike) -> Callable[[Any, Any], Array]:
    """Return a program that `export` wrote, as a function of image and features that is compiled for each shape.

    Raises:
        OSError: if there is no such file.
        ValueError: if it holds no program.
        ImportError: if the package flatbuffers is not installed.
    """
    data = bytearray(Path(path).read_bytes())
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError('Programs are read with flatbuffers: pip install "anyup-jax[export]".')
    try:
        program = jax_export.deserialize(data)
    except Exception as error:  # whatever flatbuffers runs into
        raise ValueError(f"{os.fspath(path)} holds no program of jax.export; export it or copy it again.") from error
    return jax.jit(program.call)
