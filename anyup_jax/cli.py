"""The command line: `python -m anyup_jax demo` draws a picture, `python -m anyup_jax upsample` writes features.

jax and matplotlib are imported inside the functions that need them, after the arguments have been checked. PyTorch is
imported for `--encoder timm:NAME` only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from anyup_core.files import (
    ARRAY_SUFFIXES,
    BAND_SUFFIXES,
    check_output,
    read_features,
    read_image,
    resize_image,
    write_bands,
    write_features,
)
from anyup_core.preprocessing import normalize

if TYPE_CHECKING:
    from jaxtyping import Array

ENCODER = "efficientnet_lite0"
WEIGHTS, RANDOM = "anyup_efficientnet_lite", "random"
COMPUTED = ("float32", "bfloat16")  # types of the model
CROP = 32  # the demo's image has sides that are multiples of it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after one line on stderr that says what was wrong."""
    args = build_parser().parse_args(argv)
    try:
        args.command(args)
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of both commands; `args.command` is the function to call."""
    parser = Parser(prog="python -m anyup_jax", description="AnyUp: features of any vision encoder at any resolution.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo_parser = commands.add_parser(
        "demo", help="draw features before and after upsampling", description=demo.__doc__
    )
    demo_parser.set_defaults(command=demo)
    demo_parser.add_argument("image", nargs="?", metavar="IMAGE", help="an image file (default: a shipped photograph)")
    demo_parser.add_argument("--picture", default="outputs/demo.png", metavar="P.png", help="default: %(default)s")
    demo_parser.add_argument(
        "--short-side",
        type=_positive,
        default=448,
        metavar="N",
        help="the image is resized to it (default: %(default)s)",
    )

    demo_parser.add_argument(
        "--torch", action="store_true", help="upsample with the PyTorch mirror too, and print the largest difference"
    )

    up_parser = commands.add_parser("upsample", help="write upsampled features to a file", description=upsample.__doc__)
    up_parser.set_defaults(command=upsample)
    up_parser.add_argument("image", metavar="IMAGE", help="an image file")
    up_parser.add_argument(
        "--out",
        required=True,
        metavar="F",
        help="the file to write: .npy or .zarr, band by band, so that it may be larger than memory; .npz or "
        ".safetensors, from memory at once",
    )
    up_parser.add_argument("--features", metavar="F.npy", help="features (h, w, C) of the image, instead of an encoder")
    up_parser.add_argument(
        "--output-size", type=_positive, nargs=2, metavar=("H", "W"), help="of the features (default: the image's)"
    )
    up_parser.add_argument(
        "--max-side", type=_positive, metavar="N", help="shrink the image to at most N pixels a side"
    )

    for command, repeat in ((demo_parser, "one row of pictures each"), (up_parser, "their channels are concatenated")):
        encoder = command.add_argument_group("encoder")
        encoder.add_argument(
            "--encoder",
            metavar="NAME",
            help="timm's name of a Flax encoder, or timm:NAME for any timm model, which needs PyTorch "
            f"(default: {ENCODER})",
        )
        encoder.add_argument(
            "--layer", type=int, action="append", metavar="I", help=f"block or stage; may be repeated: {repeat}"
        )
        encoder.add_argument(
            "--encoder-weights", metavar="FILE", help="its state dict (default: the pretrained weights)"
        )
        model = command.add_argument_group("AnyUp")
        model.add_argument(
            "--weights",
            default=WEIGHTS,
            metavar="W",
            help='a name, a file, or "random" (default: %(default)s; anyup_multi_backbone for DINO and its like)',
        )
        model.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights (default: 0)")
        model.add_argument("--window", choices=("paper", "natten"), help="which keys a query sees")
        model.add_argument("--backend", metavar="NAME", help="how attention is computed")
        model.add_argument("--q-chunk-size", type=_positive, metavar="N", help="query positions worked on at once")
    demo_parser.add_argument("--dtype", choices=COMPUTED, default="float32", help="of the computation (%(default)s)")
    up_parser.add_argument(
        "--dtype",
        choices=(*COMPUTED, "float16"),
        default="float32",
        help="float32 (default); bfloat16: computed in it, written as float32; float16: computed in float32, written "
        "as float16",
    )
    return parser


def demo(args: argparse.Namespace) -> None:
    """Draw one picture: the image, its low-resolution features, and the features upsampled bilinearly and by AnyUp."""
    from anyup_core import figure, visualize

    figure.load_figure_class()
    Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
    path = check_output(args.picture, (".png",))
    mirror = _mirror(args) if args.torch else None
    image = _crop(read_image(args.image) if args.image else _shipped_photograph(), args.short_side)
    name, layers = args.encoder or ENCODER, args.layer or [-2, -1]
    _say("image", f"{args.image or 'astronaut (NASA, shipped with scikit-image)'}, {_times(image.shape[:2])}")
    _say("encoder", f"{name}, weights: {args.encoder_weights or 'pretrained'}")
    _say("AnyUp", f"weights: {describe_weights(args)}")
    encoders = (_encoder(args, layer) for layer in layers)
    maps = [(encoder.stride, np.asarray(encode(encoder, image), np.float32)) for encoder in encoders]
    model = build_model(args)

    note = " (untrained)" if args.weights == RANDOM else ""
    panels = []
    for stride, features in maps:
        wheel = visualize.color_wheel(*features.shape[:2])
        values = np.concatenate([features, wheel], -1)  # one run gives features and attention picture
        result = run(model, image, features, values, image.shape[:2], args.q_chunk_size)
        upsampled, looks_at = np.split(result.output, [features.shape[-1]], -1)
        smooth = visualize.bilinear(features, image.shape[:2])
        basis = visualize.pca_basis([features])
        small, blurred, sharp = visualize.pca_colors(features, smooth, upsampled, basis=basis)
        panels += [
            (f"image\n{_times(image.shape[:2])}", image),
            (f"features, stride {stride}\n{_times(features.shape)}", small),
            (f"bilinear\n{_times(smooth.shape)}", blurred),
            (f"AnyUp{note}\n{_times(upsampled.shape)}", sharp),
            (f"AnyUp attention{note}\nwhere each pixel looks", visualize.oklab_picture(looks_at)),
        ]
        _say(f"stride {stride}", f"{_times(features.shape)} -> {_times(upsampled.shape)}, {result.times}")
        if mirror is not None:
            _say("  PyTorch", mirror(image, features, upsampled))
    title = "AnyUp demo" + (", UNTRAINED weights" if args.weights == RANDOM else "")
    subtitle = f"Encoder: {name}. AnyUp weights: {describe_weights(args)}. Colours: one PCA and one range per row."
    figure.draw_panels(path, panels, columns=5, title=title, subtitle=subtitle)
    _say("picture", path)


def upsample(args: argparse.Namespace) -> None:
    """Upsample the features of an image, an encoder's or your own, and write them to a file.

    The output of .npy and .zarr is computed and written in bands of rows, with memory that does not grow with its
    height; this takes several times as long as .npz or .safetensors, whose output has to fit into memory.
    """
    path = check_output(args.out, (*ARRAY_SUFFIXES, *BAND_SUFFIXES[1:]))
    if args.features and (args.encoder or args.layer or args.encoder_weights):
        raise ValueError("--features brings its own features; leave --encoder, --layer and --encoder-weights out.")
    image = read_image(args.image)
    height, width = image.shape[:2]
    if args.max_side and max(height, width) > args.max_side:
        scale = args.max_side / max(height, width)
        image = resize_image(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    _say("image", f"{args.image}, {_times(image.shape[:2])}")
    if args.features:
        features = read_features(args.features)
        source = {"features": str(args.features)}
    else:
        encoder = _encoder(args, tuple(args.layer or [-1]))
        features = encode(encoder, image)
        source = {"encoder": encoder.name, "layers": list(encoder.layers), "stride": encoder.stride}
    _say("features", f"{source.get('encoder') or source['features']}, {_times(features.shape)}")
    _say("AnyUp", f"weights: {describe_weights(args)}")
    model = build_model(args)
    size = tuple(args.output_size or image.shape[:2])
    metadata = {
        "image": str(args.image),
        "image_size": list(image.shape[:2]),
        "features_size": list(features.shape),
        "output_size": list(size),
        **source,
        "weights": describe_weights(args),
        "window": model.config.window,
        "dtype": args.dtype,
    }
    dtype = "float16" if args.dtype == "float16" else "float32"
    shape = (*size, features.shape[-1])
    if path.suffix in BAND_SUFFIXES:
        from anyup_jax.bands import upsample_bands

        start = time.perf_counter()
        options = dict(q_chunk_size=args.q_chunk_size, dtype=dtype)
        bands = upsample_bands(model, normalize(image)[None], np.asarray(features)[None], size, **options)
        write_bands(path, (band[0] for band in bands), shape, metadata, dtype)
        times = f"in bands of rows, compiled, ran and written in {time.perf_counter() - start:.2f} s"
    else:
        result = run(model, image, features, features, size, args.q_chunk_size)
        write_features(path, result.output, metadata, dtype)
        times = result.times
    _say("upsampled", f"{_times(shape)}, {dtype}, {times}")
    _say("written", path)


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
    import jax.numpy as jnp
    from flax import nnx

    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state, image, features, values):
        return nnx.merge(graphdef, state)(image, features, output_size, q_chunk_size, values)

    arrays = [jnp.asarray(array)[None] for array in (normalize(image), features, values)]
    start = time.perf_counter()
    compiled = call.lower(state, *arrays).compile()
    middle = time.perf_counter()
    output = jax.block_until_ready(compiled(state, *arrays))
    end = time.perf_counter()
    return Result(np.asarray(output[0], np.float32), middle - start, end - middle)


def build_model(args: argparse.Namespace) -> Any:
    """Return the model `--weights` names, with the options of the command line."""
    import jax.numpy as jnp
    from flax import nnx

    from anyup_jax import AnyUp, AnyUpConfig

    dtype = jnp.dtype(args.dtype if args.dtype in COMPUTED else "float32")
    if args.weights == RANDOM:
        return AnyUp(AnyUpConfig(**_overrides(args)), rngs=nnx.Rngs(args.seed), dtype=dtype)
    from anyup_jax.pretrained import from_pretrained

    return from_pretrained(args.weights, dtype=dtype, **_overrides(args))


def _mirror(args: argparse.Namespace) -> Callable[..., str]:
    """Return a function that does the same in PyTorch, and says how long it took and how far apart the outputs are."""
    if args.weights == RANDOM:
        raise ValueError("--torch compares the frameworks with the same weights; random ones differ, name --weights.")
    try:
        torch, anyup_torch = (importlib.import_module("torch"), importlib.import_module("anyup_torch"))
    except ModuleNotFoundError as error:
        raise ImportError(f'--torch needs {error.name}: pip install "anyup-jax[torch]", or leave it out.') from error
    model = anyup_torch.from_pretrained(args.weights, **_overrides(args))

    def compare(
        image: UInt8[np.ndarray, "H W 3"], features: Float[np.ndarray, "h w C"], ours: Float[np.ndarray, "H W C"]
    ) -> str:
        first = (torch.from_numpy(x.transpose(2, 0, 1).copy())[None] for x in (normalize(image), features))
        start = time.perf_counter()
        with torch.inference_mode():
            theirs = model(*first, q_chunk_size=args.q_chunk_size)
        seconds = time.perf_counter() - start
        difference = np.abs(theirs[0].permute(1, 2, 0).numpy() - ours).max()
        return f"ran in {seconds:.2f} s, largest difference {difference:.1e} (largest value {np.abs(ours).max():.1f})"

    return compare


def _overrides(args: argparse.Namespace) -> dict[str, str]:
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


def _encoder(args: argparse.Namespace, layer: int | tuple[int, ...]) -> Any:
    from anyup_jax import encoders
    from anyup_jax.encoders import timm_bridge

    name, options = args.encoder or ENCODER, dict(layer=layer, weights=args.encoder_weights)
    if name.startswith(timm_bridge.PREFIX):
        return timm_bridge.create(name.removeprefix(timm_bridge.PREFIX), **options)
    return encoders.create(name, **options)


def _shipped_photograph() -> UInt8[np.ndarray, "H W 3"]:
    try:
        data = importlib.import_module("skimage.data")
    except ModuleNotFoundError as error:
        message = 'The demo\'s photograph comes with scikit-image, which is not installed: pip install "anyup-jax[viz]"'
        raise ImportError(f"{message}, or name an image file.") from error
    return data.astronaut()


def _crop(image: UInt8[np.ndarray, "H W 3"], short_side: int) -> UInt8[np.ndarray, "h w 3"]:
    """Resize to the short side, then cut the centre whose sides are multiples of 32."""
    if short_side < 2 * CROP:
        raise ValueError(f"--short-side {short_side} is too small for the demo; give at least {2 * CROP}.")
    scale = short_side / min(image.shape[:2])
    image = resize_image(image, tuple(round(side * scale) for side in image.shape[:2]))
    rows, cols = (side // CROP * CROP for side in image.shape[:2])
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - cols) // 2
    return image[top : top + rows, left : left + cols]


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def _say(label: str, value: object) -> None:
    from rich.console import Console
    from rich.text import Text

    Console().print(Text.assemble((f"{label:<11}", "bold"), str(value)), soft_wrap=True)
