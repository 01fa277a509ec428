"""python -m convert SRC DST: turn a checkpoint of AnyUp or of an encoder into another format."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from anyup_core.checkpoints import encoder_checkpoint, encoder_files, formats, listing, names
from anyup_core.checkpoints.checkpoint import Checkpoint
from convert import training_state, verify

SETTINGS = ("window_ratio", "num_heads", "window")  # that the weights do not tell
EPILOG = """formats: .pth and .pt (PyTorch), .safetensors (PyTorch's layout), a directory (Orbax, Flax's layout).
SRC may also be the name of a checkpoint: """ + ", ".join(names.NAMES)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m convert",
        usage="%(prog)s [options] SRC [DST]\n       %(prog)s [options] --timm NAME [--weights FILE] [DST]",
        description="Convert a checkpoint of AnyUp or of an encoder; the formats follow from the paths.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("source", metavar="SRC", nargs="?", help="checkpoint to read")
    result.add_argument("destination", metavar="DST", nargs="?", help="checkpoint to write")
    result.add_argument("--inspect", action="store_true", help="list the tensors of SRC beside their counterparts")
    result.add_argument("--verify", action="store_true", help="run both frameworks and print their largest difference")
    result.add_argument(
        "--training", action="store_true", help="with the optimizer: a run of `train` to a trainer's .pth, or back"
    )
    result.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint of the same format")
    timm = result.add_argument_group("encoders (the name is kept in .safetensors and Orbax)")
    timm.add_argument("--timm", metavar="NAME", help="an encoder of timm, whose pretrained weights timm fetches")
    timm.add_argument("--weights", metavar="FILE", help="its weights, in place of these")
    facts = result.add_argument_group("what the weights of AnyUp do not tell (kept in .safetensors and Orbax)")
    facts.add_argument("--window-ratio", type=float, metavar="R", help="half-width of the window, default 0.1")
    facts.add_argument("--num-heads", type=int, metavar="N", help="attention heads, default 4")
    facts.add_argument("--window", choices=("paper", "natten"), help="which keys a query sees, default paper")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after printing what was wrong."""
    command = parser()
    args = command.parse_args(arguments)
    if args.timm and not args.destination:  # SRC may be left out
        args.source, args.destination = args.weights, args.source
    elif args.weights:
        command.error("--weights belongs to --timm NAME and takes the place of SRC; give one of the two")
    elif not args.source:
        command.error("SRC is missing; give a checkpoint to read, or --timm NAME")
    if not (args.destination or args.inspect or args.verify):
        command.error("DST is missing; give the path to write, or --inspect or --verify to look at SRC alone")
    if args.training and (args.timm or args.inspect or args.verify):
        command.error("--training takes SRC and DST alone; leave out --timm, --inspect and --verify")
    try:
        run_training(args) if args.training else run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    out = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    path = None if args.source is None else names.locate(args.source)
    name = args.timm or formats.read_config(path).get(formats.ENCODER_KEY)
    if args.destination:
        formats.check_destination(args.destination, overwrite=args.overwrite)
    if name is None:
        run_anyup(args, path, out)
    else:
        run_encoder(args, name, path, out)


def run_anyup(args: argparse.Namespace, path: Path, out: Console) -> None:
    if args.inspect:
        tensors, _ = formats.read_tensors(path)
        flax = formats.format_of(path) == formats.ORBAX
        fitting = [] if flax else encoder_checkpoint.architectures(tensors)
        out.print(listing.render(tensors, flax=flax, name=fitting[0] if fitting else None))
    if not (args.destination or args.verify):
        return
    source = _configured(formats.read(path), args)
    written = source
    if args.destination:
        formats.write(args.destination, source, overwrite=args.overwrite)
        _say_written(out, args.destination, source, ", ".join(f"{field}={source.config[field]}" for field in SETTINGS))
        written = Checkpoint(formats.read(args.destination).tensors, source.config)
    if args.verify:
        difference = verify.largest_difference(source, written)
        out.print(f"largest difference between PyTorch and Flax: {difference:.2e}")
        _require_small(difference)


def run_training(args: argparse.Namespace) -> None:
    """Convert a run of `train` to a .pth file of PyTorch's trainer, or the other way round."""
    source, destination = Path(args.source), Path(args.destination)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist.")
    kinds = formats.format_of(source), formats.format_of(destination)
    if kinds == (formats.ORBAX, formats.TORCH):
        formats.check_destination(destination, overwrite=args.overwrite)
        state = training_state.TrainingState.from_run(source)
    elif kinds == (formats.TORCH, formats.ORBAX):
        training_state.check_new(destination)
        state = training_state.read(source)
    else:
        raise ValueError(
            "--training converts the directory of a run to a .pth file, or a .pth file to a new directory; "
            f"{source} and {destination} are no such pair."
        )
    state = dataclasses.replace(state, checkpoint=_configured(state.checkpoint, args))
    if kinds[1] == formats.TORCH:
        training_state.write(destination, state)
    else:
        state.write_run(destination)
    print(f"{destination}: {len(state.checkpoint.tensors)} tensors, their moments and step {state.step} written")


def run_encoder(args: argparse.Namespace, name: str, path: Path | None, out: Console) -> None:
    given = [f"--{field.replace('_', '-')}" for field in SETTINGS if getattr(args, field) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} belongs to AnyUp, and {name} is an encoder; leave it out.")
    source = None
    if path is None:
        import anyup_torch.encoders

        source = anyup_torch.encoders.from_timm(name)
    if args.inspect:
        tensors = source.tensors if path is None else formats.read_tensors(path)[0]
        flax = path is not None and formats.format_of(path) == formats.ORBAX
        out.print(listing.render(tensors, flax=flax, name=name))
    if not (args.destination or args.verify):
        return
    source = source or encoder_files.read(path, name)
    written = source
    if args.destination:
        formats.write(args.destination, source, overwrite=args.overwrite)
        _say_written(out, args.destination, source, f"encoder={source.published.full_name}")
        written = encoder_files.read(Path(args.destination), source.published.full_name)
    if args.verify:
        difference = verify.largest_encoder_difference(source, written)
        out.print(f"largest difference between timm and Flax: {difference:.2e} of the largest feature")
        _require_small(difference)


def _say_written(
    out: Console, destination: str, checkpoint: Checkpoint | encoder_checkpoint.EncoderCheckpoint, settings: str
) -> None:
    """Print what was written, and what became of the settings that the weights do not tell."""
    kept = "; a state dict does not keep" if formats.format_of(destination) == formats.TORCH else ", with"
    out.print(f"{destination}: {len(checkpoint.tensors)} tensors written{kept} {settings}", soft_wrap=True)


def _require_small(difference: float) -> None:
    if not difference <= verify.TOLERANCE:
        raise ValueError(f"the frameworks differ by {difference:.2e}, more than {verify.TOLERANCE:.0e}.")


def _configured(checkpoint: Checkpoint, args: argparse.Namespace) -> Checkpoint:
    """Complete the configuration with the options and with the defaults. Raises ValueError for an impossible one."""
    from anyup_core.config import AnyUpConfig

    given = {name: getattr(args, name) for name in SETTINGS}
    fields = checkpoint.configured(**{name: value for name, value in given.items() if value is not None})
    return Checkpoint(checkpoint.tensors, dataclasses.asdict(AnyUpConfig().replace(**fields)))


if __name__ == "__main__":
    sys.exit(main())
