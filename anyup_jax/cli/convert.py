"""`anyup convert`, also `python -m convert`: a checkpoint of AnyUp or of an encoder in another format."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyup_core.checkpoints import encoder_checkpoint, encoder_files, formats, names, publishing, run_directory
from anyup_core.checkpoints.checkpoint import Checkpoint, warn_unless_finite
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.config import AnyUpConfig
from anyup_core.paths import expanded
from anyup_core.upsamplers import catalogue, sources
from anyup_core.upsamplers.checkpoint import KEY as UPSAMPLER_KEY
from anyup_core.upsamplers.checkpoint import UpsamplerCheckpoint

if TYPE_CHECKING:
    from rich.console import Console

SETTINGS = ("window_ratio", "num_heads", "window")  # that the weights do not tell
UPSAMPLER_SETTINGS = ("num_heads", "kernel_size")  # likewise, of JAFAR and NAF
Weights = Checkpoint | EncoderCheckpoint | UpsamplerCheckpoint
TEXTS: dict[str, Any] = dict(
    description="Convert a checkpoint of AnyUp, an encoder or another upsampler; the formats follow from the paths.",
    usage="%(prog)s [options] SRC [DST]\n       %(prog)s [options] --timm NAME [--weights FILE] [DST]\n"
    "       %(prog)s [options] --upsampler METHOD SRC [DST]",
    epilog="formats: .pth and .pt (PyTorch), .safetensors (PyTorch's layout), a directory (Orbax, Flax's layout; with\n"
    "--hub config.json, model.safetensors and a model card, as the Hugging Face hub holds them).\n"
    f"SRC may also be the name of a checkpoint: {', '.join(names.NAMES)}, or org/name on the hub",
    formatter_class=argparse.RawDescriptionHelpFormatter,
)
"""What the parser of the command receives."""

Verify = Callable[[Weights, Weights], str]
"""Runs both frameworks with the weights read and the weights written. Returns a line to print, or raises ValueError."""

ConvertRun = Callable[[Path, Path, bool, Callable[[Checkpoint], Checkpoint]], str]
"""Takes SRC and DST of `--training`, whether it may overwrite, and how a configuration is completed. Returns a line."""


def add_to(commands: argparse._SubParsersAction) -> None:
    add_arguments(commands.add_parser("convert", help="turn a checkpoint into another format", **TEXTS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=convert)
    parser.add_argument("source", type=expanded, metavar="SRC", nargs="?", help="checkpoint to read")
    parser.add_argument("destination", type=expanded, metavar="DST", nargs="?", help="checkpoint to write")
    parser.add_argument("--inspect", action="store_true", help="list the tensors of SRC beside their counterparts")
    verify = "run both frameworks and print their largest difference (in a checkout)"
    parser.add_argument("--verify", action="store_true", help=verify)
    training = "with the optimizer: a run of `train` to a trainer's .pth, or back (in a checkout)"
    parser.add_argument("--training", action="store_true", help=training)
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint of the same format")
    hub = "write a folder for the Hugging Face hub; the card tells what SRC does, if it is a run of `train`"
    parser.add_argument("--hub", action="store_true", help=hub)
    parser.add_argument("--license", metavar="ID", help="with --hub: the licence of the weights, such as cc-by-4.0")
    timm = parser.add_argument_group("encoders (the name is kept in .safetensors and Orbax)")
    timm.add_argument("--timm", metavar="NAME", help="an encoder of timm, whose pretrained weights timm fetches")
    timm.add_argument("--weights", type=expanded, metavar="FILE", help="its weights, in place of these")
    facts = parser.add_argument_group("what the weights of AnyUp do not tell (kept in .safetensors and Orbax)")
    facts.add_argument("--window-ratio", type=float, metavar="R", help="half-width of the window, default 0.1")
    facts.add_argument("--num-heads", type=int, metavar="N", help="attention heads, default 4; also of JAFAR and NAF")
    facts.add_argument("--window", choices=("paper", "natten"), help="which keys a query sees, default paper")
    other = parser.add_argument_group("other upsamplers (the name is kept in .safetensors and Orbax)")
    methods = [name for name, method in catalogue.METHODS.items() if not method.weightless]
    other.add_argument("--upsampler", choices=methods, help="whose weights SRC, a path or a published name, holds")
    other.add_argument("--kernel-size", type=int, metavar="K", help="cells along a side of NAF's window, default 9")


def convert(args: argparse.Namespace, *, verify: Verify | None = None, convert_run: ConvertRun | None = None) -> None:
    """Run the command; a checkout passes in the functions behind `--verify` and `--training`.

    Raises ValueError for options that do not fit together, and as `formats` does.
    """
    if args.timm and not args.destination:  # SRC may be left out
        args.source, args.destination = args.weights, args.source
    elif args.weights:
        raise ValueError("--weights belongs to --timm NAME and takes the place of SRC; give one of the two.")
    elif not args.source:
        raise ValueError("SRC is missing; give a checkpoint to read, or --timm NAME.")
    if not (args.destination or args.inspect or args.verify):
        raise ValueError("DST is missing; give the path to write, or --inspect or --verify to look at SRC alone.")
    if args.training and (args.timm or args.inspect or args.verify):
        raise ValueError("--training takes SRC and DST alone; leave out --timm, --inspect and --verify.")
    if args.hub and (args.training or args.timm or not args.destination):
        raise ValueError("--hub writes AnyUp to a folder DST; give DST, and leave out --timm and --training.")
    if args.upsampler and (args.timm or args.training or args.hub):
        raise ValueError("--upsampler takes SRC and DST alone; leave out --timm, --training and --hub.")
    if args.license and not args.hub:
        raise ValueError("--license is for the model card, which only --hub writes.")
    for option, function in (("verify", verify), ("training", convert_run)):
        if getattr(args, option) and function is None:
            raise ValueError(f"--{option} needs a checkout of AnyUp-JAX; run python -m convert there.")
    if args.training and convert_run is not None:
        print(convert_run(Path(args.source), Path(args.destination), args.overwrite, lambda x: configured(x, args)))
        return
    kind = formats.HUB if args.hub else None
    if args.destination:
        formats.check_destination(args.destination, overwrite=args.overwrite, kind=kind)
    out = console()
    if args.inspect:
        list_tensors(args.source, args.timm, out, args.upsampler)
    if not (args.destination or args.verify):
        return
    source = written = load(args)
    if args.destination:
        if args.hub:
            path = write_for_hub(args, source)
        else:
            path = formats.write(args.destination, source, overwrite=args.overwrite)
        out.print(written_text(args.destination, source), soft_wrap=True)
        if isinstance(source, EncoderCheckpoint):
            written = encoder_files.read(path, source.published.full_name)
        elif isinstance(source, UpsamplerCheckpoint):
            written = sources.read(source.method, path, **sources.checkpoint_settings(source))
        else:
            written = Checkpoint(formats.read(path).tensors, source.config)
    if args.verify and verify is not None:
        out.print(verify(source, written))


def write_for_hub(args: argparse.Namespace, checkpoint: Weights) -> Path:
    """Write a folder for the hub. Raises ValueError for anything but AnyUp."""
    if not isinstance(checkpoint, Checkpoint):
        kind, name = next(iter(checkpoint.config.items()))
        raise ValueError(f"--hub writes AnyUp, and {args.source} holds the {kind} {name}.")
    run = Path(args.source) if run_directory.step_directory(Path(args.source)) else None
    return publishing.save(args.destination, checkpoint, run=run, license=args.license, overwrite=args.overwrite)


def load(args: argparse.Namespace) -> Weights:
    """Return the weights of SRC, or those that timm fetches."""
    if method := args.upsampler or _upsampler_of(args.source):
        foreign = [field for field in SETTINGS if field not in UPSAMPLER_SETTINGS and getattr(args, field) is not None]
        if foreign:
            raise ValueError(f"--{foreign[0].replace('_', '-')} belongs to AnyUp, not to {method}; leave it out.")
        given = {field: x for field in UPSAMPLER_SETTINGS if (x := getattr(args, field)) is not None}
        return sources.load(
            method, args.source, **{field: value for field, value in given.items() if value is not None}
        )
    path = names.locate(args.source) if args.source else None
    own_name = formats.read_config(path).get(formats.ENCODER_KEY) if path else None
    encoder: str | None = args.timm or own_name
    if args.kernel_size is not None:
        raise ValueError("--kernel-size belongs to NAF; give --upsampler naf, or leave it out.")
    if path and encoder is None:
        return configured(formats.read(path), args)
    if given := [f"--{field.replace('_', '-')}" for field in SETTINGS if getattr(args, field) is not None]:
        raise ValueError(f"{', '.join(given)} belongs to AnyUp, and {encoder} is an encoder; leave it out.")
    return encoder_files.read(path, str(encoder)) if path else fetched_by_timm(str(encoder))


def _upsampler_of(source: str | None) -> str | None:
    """Return the upsampler whose name a file carries beside its weights; None for any other."""
    path = Path(source) if source else None
    return formats.read_config(path).get(UPSAMPLER_KEY) if path and path.exists() else None


def fetched_by_timm(name: str) -> EncoderCheckpoint:
    """Return the pretrained weights of an encoder. Raises ImportError without PyTorch or timm."""
    try:
        from anyup_torch.encoders import from_timm
    except ModuleNotFoundError as error:
        raise ImportError(
            f"timm fetches the weights of {name}, and {error.name} is not installed: "
            'pip install "anyup-jax[torch]", or give a local file with --weights FILE.'
        ) from error
    return from_timm(name)


def console() -> Console:
    """Return a console that does not wrap what is piped into a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def list_tensors(source: str | None, encoder: str | None, out: Console, upsampler: str | None = None) -> None:
    """Print the tensors of a checkpoint beside their counterparts, or those of timm's weights of an encoder."""
    from anyup_core.checkpoints import listing

    if source is not None and (method := upsampler or _upsampler_of(source)):
        checkpoint = sources.load(method, source)
        out.print(listing.render(checkpoint.tensors, flax=False, name=method, rows=checkpoint.rows))
        return
    if source is None:
        tensors, name, flax = fetched_by_timm(encoder or "").tensors, encoder, False
    else:
        path = names.locate(source)
        tensors, config = formats.read_tensors(path)
        warn_unless_finite(tensors, path)
        name, flax = encoder or config.get(formats.ENCODER_KEY), formats.format_of(path) == formats.ORBAX
    if name is None and not flax:
        name = next(iter(encoder_checkpoint.architectures(tensors)), None)
    out.print(listing.render(tensors, flax=flax, name=name))


def written_text(destination: str, checkpoint: Weights) -> str:
    """Return what was written, and what became of the settings that the weights do not tell."""
    if isinstance(checkpoint, EncoderCheckpoint):
        settings = f"encoder={checkpoint.published.full_name}"
    elif isinstance(checkpoint, UpsamplerCheckpoint):
        settings = ", ".join(f"{field}={value}" for field, value in checkpoint.config.items())
    else:
        settings = ", ".join(f"{field}={checkpoint.config[field]}" for field in SETTINGS)
    kept = "; a state dict does not keep" if formats.format_of(destination) == formats.TORCH else ", with"
    return f"{destination}: {len(checkpoint.tensors)} tensors written{kept} {settings}"


def configured(checkpoint: Checkpoint, args: argparse.Namespace) -> Checkpoint:
    """Complete the configuration with the options and with the defaults. Raises ValueError for an impossible one."""
    given = {name: getattr(args, name) for name in SETTINGS}
    fields = checkpoint.configured(**{name: value for name, value in given.items() if value is not None})
    return Checkpoint(checkpoint.tensors, dataclasses.asdict(AnyUpConfig().replace(**fields)))
