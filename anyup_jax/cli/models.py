"""The encoder and the model that the options of a command name, and running them."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from anyup_core.files import resize_image
from anyup_core.preprocessing import normalize
from anyup_jax.cli.parser import ENCODER, RANDOM

if TYPE_CHECKING:
    from jaxtyping import Array

COMPUTED = ("float32", "bfloat16")  # types of the model


@dataclasses.dataclass(frozen=True)
class Result:
    """An upsampled map and the seconds that compiling and running took."""

    output: Float[np.ndarray, "Ho Wo E"]
    compile_seconds: float
    run_seconds: float

    @property
    def times(self) -> str:
        return f"compiled in {self.compile_seconds:.2f} s, ran in {self.run_seconds:.2f} s"


def run(
    model: Any,
    image: UInt8[np.ndarray, "H W 3"],
    features: Float[np.ndarray | Array, "h w C"],
    values: Float[np.ndarray | Array, "h w E"],
    output_size: tuple[int, int],
    q_chunk_size: int | None,
) -> Result:
    """Compile the model for these shapes, run it once on one image, and time both."""
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
    end = time.perf_counter()
    return Result(np.asarray(output[0], np.float32), middle - start, end - middle)


def build_model(args: argparse.Namespace) -> Any:
    """Return the model `--weights` names, with the options of the command line."""
    import jax.numpy as jnp
    from flax import nnx

    from anyup_jax import AnyUp, AnyUpConfig

    dtype = jnp.dtype(args.dtype if args.dtype in COMPUTED else "float32")
    if args.weights == RANDOM:
        return AnyUp(AnyUpConfig(**overrides(args)), rngs=nnx.Rngs(args.seed), dtype=dtype)
    from anyup_jax.pretrained import from_pretrained

    return from_pretrained(args.weights, dtype=dtype, **overrides(args))


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("window", "backend") if getattr(args, name)}


def describe_weights(args: argparse.Namespace) -> str:
    """Return the weights in words; random ones are called untrained."""
    return f"UNTRAINED, random initialisation with seed {args.seed}" if args.weights == RANDOM else args.weights


def encode(encoder: Any, image: UInt8[np.ndarray, "H W 3"]) -> Float[Array, "h w C"]:
    """Return the features of the whole image, resized for the encoder to the nearest multiples of its stride."""
    import jax.numpy as jnp

    size = tuple(max(2, round(side / encoder.stride)) * encoder.stride for side in image.shape[:2])
    pixels = jnp.asarray(resize_image(image, size) / np.float32(255))
    return encoder(encoder.normalize(pixels[None]))[0]


def create_encoder(args: argparse.Namespace, layer: int | tuple[int, ...]) -> Any:
    from anyup_jax import encoders
    from anyup_jax.encoders import timm_bridge

    name, create = args.encoder or ENCODER, encoders.create
    if name.startswith(timm_bridge.PREFIX):
        name, create = name.removeprefix(timm_bridge.PREFIX), timm_bridge.create
    return create(name, layer=layer, weights=args.encoder_weights)


def sizes_text(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def say(label: str, value: object) -> None:
    from rich.console import Console
    from rich.text import Text

    Console().print(Text.assemble((f"{label:<11}", "bold"), str(value)), soft_wrap=True)
