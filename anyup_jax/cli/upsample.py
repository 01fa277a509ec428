"""`anyup upsample`: features at another resolution, written to a file."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from anyup_core import files
from anyup_core.checks import check_memory
from anyup_core.paths import expanded
from anyup_core.preprocessing import normalize
from anyup_jax.cli import models
from anyup_jax.cli.models import build_model, describe_weights, encode, run, say, sizes_text
from anyup_jax.cli.parser import ENCODER, add_models, positive
from anyup_jax.encoders.settings import EncoderConfig


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("upsample", help="write upsampled features to a file", description=upsample.__doc__)
    parser.set_defaults(command=upsample)
    parser.add_argument("image", type=expanded, metavar="IMAGE", help="an image file")
    formats = ".npy or .zarr, band by band, so that it may be larger than memory; .npz or .safetensors, from memory"
    parser.add_argument(
        "--out", type=expanded, required=True, metavar="F", help=f"the file to write: {formats} at once"
    )
    parser.add_argument("--features", type=expanded, metavar="F.npy", help="features (h, w, C), instead of an encoder")
    parser.add_argument(
        "--output-size", type=positive, nargs=2, metavar=("H", "W"), help="of the features (default: the image's)"
    )
    parser.add_argument("--max-side", type=positive, metavar="N", help="shrink the image to at most N pixels a side")
    add_models(parser, layers="their channels are concatenated")
    types = "bfloat16: computed in it, written as float32; float16: computed in float32, written as float16"
    choices = (*models.COMPUTED, "float16")
    parser.add_argument("--dtype", choices=choices, default="float32", help=f"float32 (default); {types}")


def upsample(args: argparse.Namespace) -> None:
    """Upsample the features of an image, an encoder's or your own, and write them to a file.

    The output of .npy and .zarr is computed and written in bands of rows, with memory that does not grow with its
    height; this takes several times as long as .npz or .safetensors, whose output has to fit into memory.
    """
    path = files.check_output(args.out, files.ARRAY_SUFFIXES + files.BAND_SUFFIXES)
    if args.features and (args.encoder or args.layer or args.encoder_weights):
        raise ValueError("--features brings its own features; leave --encoder, --layer and --encoder-weights out.")
    image = files.read_image(args.image)
    height, width = image.shape[:2]
    if args.max_side and max(height, width) > args.max_side:
        scale = args.max_side / max(height, width)
        image = files.resize_image(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    size = tuple(args.output_size or image.shape[:2])
    dtype = "float16" if args.dtype == "float16" else "float32"
    _check_room(path, (*size, 1), dtype)
    say("image", f"{args.image}, {sizes_text(image.shape[:2])}")
    from anyup_jax.devices import prepare_devices

    prepare_devices()
    if args.features:
        features = files.read_features(args.features)
        source = {"features": str(args.features)}
    else:
        layers = tuple(args.layer or [-1])
        encoder = EncoderConfig(name=args.encoder or ENCODER, weights=args.encoder_weights, layer=layers).load()
        features = encode(encoder, image)
        source = {"encoder": encoder.name, "layers": list(encoder.layers), "stride": encoder.stride}
    say("features", f"{source.get('encoder') or source['features']}, {sizes_text(features.shape)}")
    say("AnyUp", f"weights: {describe_weights(args)}")
    shape = (*size, features.shape[-1])
    _check_room(path, shape, dtype)
    model = build_model(args)
    sizes = dict(image_size=image.shape[:2], features_size=features.shape, output_size=size)
    metadata = {"image": str(args.image), **{name: list(sides) for name, sides in sizes.items()}, **source}
    metadata |= dict(weights=describe_weights(args), window=model.config.window, dtype=args.dtype)
    if path.suffix in files.BAND_SUFFIXES:
        from anyup_jax.bands import upsample_bands

        start = time.perf_counter()
        options = dict(q_chunk_size=args.q_chunk_size, dtype=dtype)
        bands = upsample_bands(model, normalize(image)[None], features[None], size, **options)
        files.write_bands(path, (band[0] for band in bands), shape, metadata, dtype)
        times = f"in bands of rows, compiled, ran and written in {time.perf_counter() - start:.2f} s"
    else:
        output, times = run(model, image, features, features, size, args.q_chunk_size)
        files.write_features(path, output, metadata, dtype)
    say("upsampled", f"{sizes_text(shape)}, {dtype}, {times}")
    say("written", path)


def _check_room(path: Path, shape: tuple[int, int, int], dtype: str) -> None:
    """Raise OSError or ValueError if the output does not fit onto the disk, or into memory where it has to."""
    if path.suffix in files.BAND_SUFFIXES:
        files.check_room(path, shape, dtype)
    else:
        check_memory(f"--output-size {shape[0]} {shape[1]}", 4 * math.prod(shape))
