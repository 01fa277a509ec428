"""`anyup demo`: one picture of what the model does."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from anyup_core.checks import check_memory
from anyup_core.config import AnyUpConfig
from anyup_core.files import check_output, read_image, resize_image
from anyup_core.paths import expanded
from anyup_core.preprocessing import normalize
from anyup_jax.cli import models
from anyup_jax.cli.models import (
    build_model,
    describe_weights,
    encode,
    overrides,
    run,
    say,
    shipped_photograph,
    sizes_text,
)
from anyup_jax.cli.parser import ENCODER, RANDOM, add_models, positive
from anyup_jax.encoders.settings import EncoderConfig

PIXEL = 4 * AnyUpConfig().qk_dim  # bytes that the model keeps of each pixel of the image
CROP = 32  # the demo's image has sides that are multiples of it


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="draw features before and after upsampling", description=demo.__doc__)
    parser.set_defaults(command=demo)
    parser.add_argument("image", type=expanded, nargs="?", metavar="IMAGE", help="default: a shipped photograph")
    parser.add_argument(
        "--picture", type=expanded, default="outputs/demo.png", metavar="P.png", help="default: %(default)s"
    )
    side = "the image's, after resizing (default: %(default)s)"
    parser.add_argument("--short-side", type=positive, default=448, metavar="N", help=side)
    compare = "upsample with the PyTorch mirror too, and print the largest difference"
    parser.add_argument("--torch", action="store_true", help=compare)
    others = "draw other upsamplers beside AnyUp instead: those without weights, and METHOD=WEIGHTS for each named one"
    parser.add_argument("--compare", nargs="*", metavar="METHOD=WEIGHTS", help=others)
    add_models(parser, layers="one row of pictures each")
    dtype = "of the computation (default: %(default)s)"
    parser.add_argument("--dtype", choices=models.COMPUTED, default="float32", help=dtype)


def demo(args: argparse.Namespace) -> None:
    """Draw one picture: the image, its low-resolution features, and the features upsampled bilinearly and by AnyUp.

    With --compare the columns are all upsamplers, whose outputs share one PCA and one range of colours in each row.
    """
    from anyup_core import figure, visualize

    figure.load_figure_class()
    Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
    path = check_output(args.picture, (".png",))
    if args.torch and args.compare is not None:
        raise ValueError("--torch compares the frameworks, --compare the upsamplers; leave one of them out.")
    mirror = _mirror(args) if args.torch else None
    others = _others(args.compare) if args.compare is not None else {}
    image = _crop(read_image(args.image) if args.image else shipped_photograph(), args.short_side)
    from anyup_jax.devices import prepare_devices

    prepare_devices()
    name, layers = args.encoder or ENCODER, args.layer or [-2, -1]
    say("image", f"{args.image or 'astronaut (NASA, shipped with scikit-image)'}, {sizes_text(image.shape[:2])}")
    say("encoder", f"{name}, weights: {args.encoder_weights or 'pretrained'}")
    say("AnyUp", f"weights: {describe_weights(args)}")
    config = EncoderConfig(name=name, weights=args.encoder_weights)
    encoders = (dataclasses.replace(config, layer=(layer,)).load() for layer in layers)
    maps = [(encoder.stride, encode(encoder, image)) for encoder in encoders]
    model = build_model(args)

    note = " (untrained)" if args.weights == RANDOM else ""
    panels = []
    for stride, features in maps:
        wheel = visualize.color_wheel(*features.shape[:2])
        values = np.concatenate([features, wheel], -1)  # one run gives features and attention picture
        output, times = run(model, image, features, values, image.shape[:2], args.q_chunk_size)
        upsampled, looks_at = np.split(output, [features.shape[-1]], -1)
        say(f"stride {stride}", f"{sizes_text(features.shape)} -> {sizes_text(upsampled.shape)}, {times}")
        if args.compare is not None:
            outputs = {key: _upsampled(key, method, image, features) for key, method in others.items()}
            outputs[f"anyup{note}"] = upsampled
            drawn = {f"features, stride {stride}": features, **outputs}
            panels += [(f"image\n{sizes_text(image.shape[:2])}", image)]
            for (title, x), colours in zip(drawn.items(), visualize.pca_colors(*drawn.values())):
                panels += [(f"{title.replace('_', ' ')}\n{sizes_text(x.shape)}", colours)]
            continue
        smooth = visualize.bilinear(features, image.shape[:2])
        basis = visualize.pca_basis([features])
        small, blurred, sharp = visualize.pca_colors(features, smooth, upsampled, basis=basis)
        panels += [
            (f"image\n{sizes_text(image.shape[:2])}", image),
            (f"features, stride {stride}\n{sizes_text(features.shape)}", small),
            (f"bilinear\n{sizes_text(smooth.shape)}", blurred),
            (f"AnyUp{note}\n{sizes_text(upsampled.shape)}", sharp),
            (f"AnyUp attention{note}\nwhere each pixel looks", visualize.oklab_picture(looks_at)),
        ]
        if mirror is not None:
            say("  PyTorch", _compare(mirror, image, features, upsampled, args.q_chunk_size))
    title = "AnyUp demo" + (", UNTRAINED weights" if args.weights == RANDOM else "")
    subtitle = f"Encoder: {name}. AnyUp weights: {describe_weights(args)}. Colours: one PCA and one range per row."
    columns = 5 if args.compare is None else len(others) + 3
    figure.draw_panels(path, panels, columns=columns, title=title, subtitle=subtitle)
    say("picture", path)


def _others(named: list[str]) -> dict[str, Any]:
    """Return the upsamplers without weights, and those whose weights are given as METHOD=WEIGHTS.

    Raises ValueError for anything else, and as `upsamplers.from_pretrained`.
    """
    from anyup_core.upsamplers.catalogue import ANYUP, METHODS
    from anyup_jax import upsamplers

    models = {name: upsamplers.from_pretrained(name) for name, method in METHODS.items() if method.weightless}
    for text in named:
        name, _, weights = text.partition("=")
        if not weights or name == ANYUP:
            raise ValueError(f"--compare {text!r} must be METHOD=WEIGHTS, as jafar=FILE; AnyUp's are --weights.")
        models[name] = upsamplers.from_pretrained(name, expanded(weights))
    return models


def _upsampled(
    name: str, model: Any, image: UInt8[np.ndarray, "H W 3"], features: Float[np.ndarray, "h w C"]
) -> Float[np.ndarray, "H W C"]:
    """Return what another upsampler makes of the features. Raises ValueError for those of other widths."""
    from anyup_jax import upsamplers

    mean, std = (np.array(value, np.float32) for value in model.normalisation)
    guide = (image / np.float32(255) - mean) / std
    try:
        output = upsamplers.upsample(model, guide[None], features[None], image.shape[:2])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return np.asarray(output[0], np.float32)


def _mirror(args: argparse.Namespace) -> Any:
    """Return the same model in PyTorch. Raises ImportError without PyTorch, ValueError for random weights."""
    if args.weights == RANDOM:
        raise ValueError("--torch compares the frameworks with the same weights; random ones differ, name --weights.")
    try:
        importlib.import_module("torch")
        return importlib.import_module("anyup_torch").from_pretrained(args.weights, **overrides(args))
    except ModuleNotFoundError as error:
        raise ImportError(f'--torch needs {error.name}: pip install "anyup-jax[torch]", or leave it out.') from error


def _compare(
    model: Any,
    image: UInt8[np.ndarray, "H W 3"],
    features: Float[np.ndarray, "h w C"],
    ours: Float[np.ndarray, "H W C"],
    q_chunk_size: int | None,
) -> str:
    """Upsample in PyTorch. Return in words how long it took and how far apart the outputs are."""
    torch = importlib.import_module("torch")
    arrays = (torch.from_numpy(x.transpose(2, 0, 1).copy())[None] for x in (normalize(image), features))
    start = time.perf_counter()
    with torch.inference_mode():
        theirs = model(*arrays, q_chunk_size=q_chunk_size)
    seconds = time.perf_counter() - start
    difference = np.abs(theirs[0].permute(1, 2, 0).numpy() - ours).max()
    return f"ran in {seconds:.2f} s, largest difference {difference:.1e} (largest value {np.abs(ours).max():.1f})"


def _crop(image: UInt8[np.ndarray, "H W 3"], short_side: int) -> UInt8[np.ndarray, "h w 3"]:
    """Resize to the short side, then cut the centre whose sides are multiples of 32."""
    if short_side < 2 * CROP:
        raise ValueError(f"--short-side {short_side} is too small for the demo; give at least {2 * CROP}.")
    scale = short_side / min(image.shape[:2])
    pixels = int(scale * image.shape[0]) * int(scale * image.shape[1])
    check_memory(f"--short-side {short_side}", PIXEL * pixels)
    image = resize_image(image, tuple(round(side * scale) for side in image.shape[:2]))
    rows, cols = (side // CROP * CROP for side in image.shape[:2])
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - cols) // 2
    return image[top : top + rows, left : left + cols]
