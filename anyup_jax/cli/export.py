"""`anyup export`: AnyUp as a file that other programs run: ONNX, torch.export, StableHLO."""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyup_core.checkpoints import names
from anyup_core.config import AnyUpConfig
from anyup_core.encoders import catalogue
from anyup_core.export import onnx_file
from anyup_core.files import resize_image
from anyup_core.paths import expanded
from anyup_core.preprocessing import normalize
from anyup_core.upsamplers import sources
from anyup_core.upsamplers.catalogue import METHODS
from anyup_jax.cli.models import say, shipped_photograph, sizes_text
from anyup_jax.cli.parser import ENCODER, positive

SUFFIXES = {".onnx": "ONNX", ".pt2": "torch.export", ".stablehlo": "jax.export"}
IMAGE, CELLS = (224, 224), (14, 14, 112)  # of `--verify`, where the file takes every size
NORM = 40.0  # of the features of the photograph
TOLERANCE = {"float32": 2e-4, "float16": 2e-2, "bfloat16": 2e-1}  # of an output up to 4; in proportion above
EPILOG = """The suffix of F decides: .onnx takes every size, or with --image and --features these alone; .pt2
(torch.export) and .stablehlo (jax.export for cpu, cuda and tpu) need both, and take any batch and any number of
channels."""


def add_to(commands: argparse._SubParsersAction) -> None:
    about = "write a file that ONNX Runtime, torch or jax run"
    parser = commands.add_parser("export", help=about, description=export.__doc__, epilog=EPILOG)
    parser.set_defaults(command=export)
    weights = "a name, a file or a folder, as --weights of `anyup upsample`; or an encoder, by its name"
    parser.add_argument("weights", type=expanded, metavar="WEIGHTS", help=weights)
    parser.add_argument("path", type=expanded, metavar="F", help=f"the file to write: {', '.join(SUFFIXES)}")
    parser.add_argument("--image", type=positive, nargs=2, metavar=("H", "W"), help="size of the image")
    parser.add_argument("--features", type=positive, nargs=3, metavar=("h", "w", "C"), help="size of the features")
    parser.add_argument("--output-size", type=positive, nargs=2, metavar=("H", "W"), help="default: the image's")
    dtype = "of the weights in .onnx (float32, float16), of the computation in .pt2 and .stablehlo (no float16)"
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help=dtype)
    parser.add_argument("--encoder", metavar="NAME", help="an EfficientNet-Lite or ViT that an ONNX file holds too")
    parser.add_argument("--stride", type=positive, metavar="N", help="of its features; default: the finest")
    parser.add_argument("--encoder-weights", type=expanded, metavar="FILE", help="default: the published weights")
    methods = [name for name, method in METHODS.items() if not method.weightless]
    other = "whose weights WEIGHTS, a path or a published name, holds (ONNX: jafar, naf)"
    parser.add_argument("--upsampler", choices=methods, help=other)
    parser.add_argument("--window", choices=("paper", "natten"), help="which keys a query sees")
    parser.add_argument("--verify", action="store_true", help="run the file and the model; print error and time")


def export(args: argparse.Namespace) -> None:
    """Write AnyUp as a file that other programs run without this package."""
    suffix = Path(args.path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{args.path} says no format; let it end with one of {', '.join(SUFFIXES)}.")
    sized = args.image is not None and args.features is not None
    if suffix != ".onnx" and not sized:
        raise ValueError(f"a {suffix} file is for one size; give --image H W and --features h w C.")
    if args.encoder_weights and not (args.encoder or _is_encoder(args.weights)):
        raise ValueError("--encoder-weights are those of an encoder; name it with --encoder, or as WEIGHTS.")
    if suffix != ".onnx" and args.encoder:
        raise ValueError("--encoder goes into ONNX files alone.")
    if suffix == ".onnx" and args.dtype == "bfloat16":
        raise ValueError("--dtype bfloat16: the weights of an ONNX file are float32 or float16.")
    if args.upsampler and (args.window or args.encoder):
        raise ValueError("--window and --encoder are AnyUp's; leave out --upsampler, or these.")
    if args.upsampler and suffix == ".onnx" and args.upsampler not in ("jafar", "naf"):
        raise ValueError(
            f"--upsampler {args.upsampler} is written as .pt2 or .stablehlo; as .onnx AnyUp, jafar and naf are."
        )
    if _is_encoder(args.weights):
        path = _export_encoder(args)
    else:
        path = _export_anyup(args, suffix)
    say("written", f"{path}, {path.stat().st_size / 1e6:.2f} MB")


def _is_encoder(name: str) -> bool:
    """Return whether this is the name of an encoder, and no file's."""
    try:
        catalogue.find(name)
    except ValueError:
        return False
    return not Path(name).exists()


def _export_encoder(args: argparse.Namespace) -> Path:
    """Write an encoder alone."""
    given = (args.image, args.features, args.output_size, args.encoder, args.window)
    if Path(args.path).suffix != ".onnx" or any(given) or args.verify:
        raise ValueError(
            f"{args.weights} is an encoder: it is written as .onnx for every size; leave out what is not --dtype or "
            "--encoder-weights."
        )
    return onnx_file.write_encoder(args.weights, args.path, dtype=args.dtype, encoder_weights=args.encoder_weights)


def _export_anyup(args: argparse.Namespace, suffix: str) -> Path:
    overrides = {"window": args.window} if args.window else {}
    options = dict(image_size=_pair(args.image), features=_pair(args.features), output_size=_pair(args.output_size))
    if suffix == ".onnx":
        onnx_file.check_file(args.path, args.dtype)
        config, tensors = _weights(args, overrides)
        extra = dict(dtype=args.dtype, encoder=args.encoder, stride=args.stride, encoder_weights=args.encoder_weights)
        start = time.perf_counter()
        path = onnx_file.write_onnx(config, tensors, args.path, **options, **extra)
    else:
        module = _import(suffix)
        model = _model(module, args, overrides)
        start = time.perf_counter()
        dtype = None if args.dtype == "float32" else args.dtype
        path = Path(module.export(model, args.path, **options, dtype=dtype))
    say("exported", f"{SUFFIXES[suffix]}, {args.dtype}, in {time.perf_counter() - start:.1f} s")
    if args.verify:
        _verify(args, path, overrides)
    return path


def _weights(args: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Any, Mapping[str, np.ndarray]]:
    """Return the settings and the tensors, without a framework."""
    if args.upsampler:
        loaded = sources.load(args.upsampler, args.weights)
        return loaded.settings, loaded.tensors
    checkpoint = names.load(args.weights)
    return AnyUpConfig().replace(**checkpoint.configured(**overrides)), checkpoint.tensors


def _model(package: Any, args: argparse.Namespace, overrides: dict[str, Any]) -> Any:
    """Return the model in a framework."""
    if args.upsampler:
        return package.upsamplers.from_pretrained(args.upsampler, args.weights)
    return package.from_pretrained(args.weights, **overrides)


def _pair(sizes: list[int] | None) -> Any:
    return None if sizes is None else tuple(sizes)


def _import(suffix: str) -> Any:
    """Return the package that writes such a file. Raises ImportError without PyTorch."""
    if suffix == ".stablehlo":
        return importlib.import_module("anyup_jax")
    try:
        importlib.import_module("torch")
        return importlib.import_module("anyup_torch")
    except ModuleNotFoundError as error:
        raise ImportError(f'.pt2 needs {error.name}: pip install "anyup-jax[torch]".') from error


def _verify(args: argparse.Namespace, path: Path, overrides: dict[str, Any]) -> None:
    """Run the file and the model on noise and on a photograph; print the differences and the times.

    Raises ValueError if they differ by more than the type of the weights explains.
    """
    import anyup_jax

    model = _model(anyup_jax, args, overrides)
    size = _pair(args.output_size)
    run = _runner(path, size)
    for name, (image, features) in _cases(args).items():
        given = (image,) if args.encoder else (image, features)
        arrays = [np.ascontiguousarray(array.transpose(0, 2, 3, 1)) for array in (image, features)]
        wanted = size or image.shape[2:]
        ours, seconds = _timed(functools.partial(run, *given))
        theirs, reference = _timed(functools.partial(_model_output, model, *arrays, wanted))
        error, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
        sizes = f"image {sizes_text(image.shape[2:])}, features {sizes_text(features.shape[1:])}"
        times = f"{seconds:.2f} s, the model in JAX {reference:.2f} s"
        say(name, f"{sizes}: largest difference {error:.1e} of {largest:.1f}; {times}")
        limit = TOLERANCE[args.dtype] * max(1, largest / 4)
        if not error <= limit:
            raise ValueError(f"{path} and the model differ by {error:.1e} on {name}, more than {limit:.1e}.")


def _model_output(model: Any, image: np.ndarray, features: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the model's output, NCHW, for NHWC inputs."""
    from anyup_jax import upsamplers

    return np.asarray(upsamplers.upsample(model, image, features, size), np.float32).transpose(0, 3, 1, 2)


def _timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """Return what a call gives, and the seconds of the faster of two further ones."""
    output, seconds = call(), []
    for _ in range(2):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return output, min(seconds)


def _cases(args: argparse.Namespace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return images and features, NCHW: noise, and a photograph with features of an encoder."""
    from anyup_jax.encoders.settings import EncoderConfig

    size, (height, width, channels) = _pair(args.image) or IMAGE, _pair(args.features) or CELLS
    photograph = resize_image(shipped_photograph(), size)
    name = args.encoder or ENCODER
    strides = catalogue.find(name).config.strides  # of the layers; the file gives the last two of an EfficientNet-Lite
    layer = -2 if strides[-2] != strides[-1] and args.stride in (None, strides[-2]) else -1
    encoder = EncoderConfig(name=name, layer=(layer,), weights=args.encoder_weights).load()
    found = encoder.encode_array(photograph / np.float32(255))
    random, guide = np.random.default_rng(0), normalize(photograph).transpose(2, 0, 1)[None]
    if args.encoder:
        return {"photograph": (guide.astype(np.float32), found.transpose(2, 0, 1)[None])}
    rows, cols = (np.arange(n) * m // n for n, m in zip((height, width), found.shape))
    fitted = found[rows][:, cols][..., np.arange(channels) % found.shape[-1]]
    fitted = (fitted * (NORM / np.linalg.norm(fitted, axis=-1).mean())).astype(np.float32)
    noise = (random.standard_normal((1, *shape), np.float32) for shape in ((3, *size), (channels, height, width)))
    image, features = noise
    return {
        "noise": (image, features),
        "photograph": (guide.astype(np.float32), np.ascontiguousarray(fitted.transpose(2, 0, 1)[None])),
    }


def _runner(path: Path, size: tuple[int, int] | None) -> Callable[..., np.ndarray]:
    """Return a function that runs an exported file on NCHW arrays."""
    if path.suffix == ".onnx":
        try:
            runtime = importlib.import_module("onnxruntime")
        except ModuleNotFoundError as error:
            raise ImportError('--verify runs the file: pip install "anyup-jax[onnx]" onnxruntime.') from error
        session = runtime.InferenceSession(str(path))
        closed = len(session.get_inputs()) == 2
        metadata = session.get_modelmeta().custom_metadata_map

        def run(image: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
            if closed:
                return session.run(None, {"image": image, "features": features})[0]
            from anyup_core.export.inputs import onnx_inputs

            return session.run(None, onnx_inputs(metadata, image, features, size))[0]

        return run
    if path.suffix == ".pt2":
        torch = importlib.import_module("torch")
        library = path.name.endswith(".aoti.pt2")
        program = torch._inductor.aoti_load_package(str(path)) if library else torch.export.load(path).module()

        def run_torch(image: np.ndarray, features: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return program(torch.from_numpy(image), torch.from_numpy(features)).float().numpy()

        return run_torch
    from jax import export as jax_export

    loaded = jax_export.deserialize(bytearray(path.read_bytes()))

    def run_jax(image: np.ndarray, features: np.ndarray) -> np.ndarray:
        output = loaded.call(*(array.transpose(0, 2, 3, 1) for array in (image, features)))
        return np.asarray(output, np.float32).transpose(0, 3, 1, 2)

    return run_jax
