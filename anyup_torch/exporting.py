"""Programs of `torch.export` and libraries of AOTInductor: files that run without this package."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from anyup_core.checks import OutputSize
from anyup_core.export.program import Shapes, check_precision, check_program
from anyup_core.replacement import replacing

LIBRARY = ".aoti.pt2"
EXAMPLES = 2, 5  # images and, times `multiple`, channels that a program of any number is traced with


def export(
    model: Any,
    path: str | os.PathLike,
    *,
    image_size: OutputSize,
    features: Sequence[SupportsIndex],
    output_size: OutputSize | None = None,
    batch: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write an upsampler as a program of image and features, for images, features and outputs of one size.

    `torch.export.load("F.pt2").module()(image, features)` runs it, NCHW, without this package; a path that ends with
    `.aoti.pt2` gets a compiled library for this machine's kind of processor or GPU,
    `torch._inductor.aoti_load_package("F.aoti.pt2")(image, features)`. Image, features and output are float32.

    The program is the model in evaluation mode, on the device that it is on. It has no loop over the images: memory
    grows with their number. For each it holds the maps of the encoders, attention scores of about 8 million pairs of
    positions and cells for each head, and of the feature unification an eighth of all responses; FeatUp three maps of
    the output's size.

    Args:
        model: AnyUp, or one of `upsamplers`.
        path: of the file, which is replaced; `.pt2` or `.aoti.pt2`.
        image_size: height and width of the image, or one number for both.
        features: height and width of the features in cells; channels may follow, but where the model takes any number
            of them the program does too (NAF: multiples of 4 from 8 on).
        output_size: height and width of the output; None for the model's `native_size`.
        batch: number of images; None for any number.
        dtype: type of the parameters and of the computation: float32, bfloat16 or float16; None for the model's own.

    Returns:
        The path.

    Raises:
        ValueError, TypeError: for another suffix, and for sizes or a type that do not fit.
        OSError: if the file cannot be written.
        RuntimeError: for a library, if there is no C++ compiler.
    """
    shapes = check_program(model, path, (".pt2",), image_size, features, output_size, batch)
    precision = None if dtype is None else getattr(torch, check_precision(dtype))
    library = os.fspath(path).endswith(LIBRARY)
    if library:
        require_compiler()
    program = trace(model, shapes, precision)
    with replacing(path) as temporary:
        if library:
            compiler: Any = torch._inductor
            compiler.aoti_compile_and_package(program, package_path=os.fspath(temporary))
        else:
            program.example_inputs = None
            torch.export.save(program, temporary)
    return Path(path)


class Program(nn.Module):
    """What is traced: an upsampler of image and features for one size of the output."""

    def __init__(self, model: nn.Module, output_size: tuple[int, int] | None):
        super().__init__()
        self.model, self.output_size = model, output_size

    def forward(
        self, image: Float[Tensor, "B input_dim H W"], features: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, "B C Ho Wo"]:
        return self.model(image, features, self.output_size)


def trace(model: Any, shapes: Shapes, dtype: torch.dtype | None = None) -> ExportedProgram:
    """Return the program of a copy of a model in evaluation mode, which computes in `dtype` (default: its own).

    Raises:
        ValueError: for sizes that the model cannot handle.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    number, channels = shapes.batch or EXAMPLES[0], shapes.channels or shapes.multiple * EXAMPLES[1]
    image = torch.zeros(number, model.config.input_dim, *shapes.image, device=device)
    features = torch.zeros(number, channels, *shapes.cells, device=device)
    images = {} if shapes.batch else {0: Dim("batch", min=1)}
    widths = {} if shapes.channels else {1: Dim("channels", min=1)}
    if not shapes.channels and shapes.multiple > 1:  # a share of one channel would be another program
        widths = {1: shapes.multiple * Dim("share", min=2)}
    dynamic = {"image": images, "features": images | widths}
    with torch.no_grad():
        program = torch.export.export(
            Program(model, shapes.output), (image, features), dynamic_shapes=dynamic, strict=False
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of this machine's files
    return program


def require_compiler() -> None:
    """Raise RuntimeError with the way out if there is no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise RuntimeError(
            f"a file that ends with {LIBRARY} is compiled, and no C++ compiler was found; install g++ or set CXX, or "
            "write a .pt2."
        ) from error
