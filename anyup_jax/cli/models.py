"""The encoder and the model that the options of a command name, and running them."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from anyup_core.files import resize_image
from anyup_core.preprocessing import normalize
from anyup_jax.cli.parser import RANDOM

COMPUTED = ("float32", "bfloat16")  # types of the model


def run(
    model: Any,
    image: UInt8[np.ndarray, "H W 3"],
    features: Float[np.ndarray, "h w C"],
    values: Float[np.ndarray, "h w E"],
    output_size: tuple[int, int],
    q_chunk_size: int | None,
) -> tuple[Float[np.ndarray, "Ho Wo E"], str]:
    """Compile the model for these shapes and run it once on one image. Return the output, and both times in words."""
    import jax
    from flax import nnx

    from anyup_jax.model import compiled

    image, features, values = (np.asarray(array)[None] for array in (normalize(image), features, values))
    graph, state = nnx.split(model)
    inputs = image, [(features, values)]
    start = time.perf_counter()
    program = compiled.lower(graph, state, *inputs, tuple(output_size), q_chunk_size).compile()
    middle = time.perf_counter()
    (output,) = jax.block_until_ready(program(state, *inputs))
    times = f"compiled in {middle - start:.2f} s, ran in {time.perf_counter() - middle:.2f} s"
    return np.asarray(output[0], np.float32), times


def build_model(args: argparse.Namespace) -> Any:
    """Return the model `--weights` names, with the options of the command line."""
    import jax.numpy as jnp
    from flax import nnx

    from anyup_jax import AnyUp, AnyUpConfig, from_pretrained

    dtype = jnp.dtype(args.dtype if args.dtype in COMPUTED else "float32")
    if args.weights == RANDOM:
        return AnyUp(AnyUpConfig(**overrides(args)), rngs=nnx.Rngs(args.seed), dtype=dtype)
    return from_pretrained(args.weights, dtype=dtype, **overrides(args))


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("window", "backend") if getattr(args, name)}


def describe_weights(args: argparse.Namespace) -> str:
    """Return the weights in words; random ones are called untrained."""
    return f"UNTRAINED, random initialisation with seed {args.seed}" if args.weights == RANDOM else args.weights


def encode(encoder: Any, image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w C"]:
    """Return the features of the whole image, resized for the encoder to the nearest multiples of its stride."""
    size = tuple(max(2, round(side / encoder.stride)) * encoder.stride for side in image.shape[:2])
    return encoder.encode_array(resize_image(image, size) / np.float32(255))


def shipped_photograph() -> UInt8[np.ndarray, "H W 3"]:
    """Return the demo's photograph. Raises ImportError without the package that holds it."""
    try:
        data = importlib.import_module("skimage.data")
    except ModuleNotFoundError as error:
        message = 'The demo\'s photograph comes with scikit-image, which is not installed: pip install "anyup-jax[viz]"'
        raise ImportError(f"{message}, or name an image file.") from error
    return data.astronaut()


def sizes_text(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def say(label: str, value: object) -> None:
    from rich.console import Console
    from rich.text import Text

    Console().print(Text.assemble((f"{label:<11}", "bold"), str(value)), soft_wrap=True)
