"""python -m convert SRC DST: turn an AnyUp checkpoint into another format."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from rich.console import Console

from convert import io, listing, release, verify
from convert.apply import Checkpoint

SETTINGS = ("window_ratio", "num_heads", "window")  # that the weights do not tell
EPILOG = """formats: .pth and .pt (PyTorch), .safetensors (PyTorch's layout), a directory (Orbax, Flax's layout).
SRC may also be the name of a published checkpoint: """ + ", ".join(release.RELEASES)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert an AnyUp checkpoint; the formats follow from the paths.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("source", metavar="SRC", help="checkpoint to read")
    result.add_argument("destination", metavar="DST", nargs="?", help="checkpoint to write")
    result.add_argument("--inspect", action="store_true", help="list the tensors of SRC beside their counterparts")
    result.add_argument("--verify", action="store_true", help="run both frameworks and print their largest difference")
    result.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint of the same format")
    facts = result.add_argument_group("what the weights do not tell (kept in .safetensors and Orbax)")
    facts.add_argument("--window-ratio", type=float, metavar="R", help="half-width of the window, default 0.1")
    facts.add_argument("--num-heads", type=int, metavar="N", help="attention heads, default 4")
    facts.add_argument("--window", choices=("paper", "natten"), help="which keys a query sees, default paper")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after printing what was wrong."""
    command = parser()
    args = command.parse_args(arguments)
    if not (args.destination or args.inspect or args.verify):
        command.error("DST is missing; give the path to write, or --inspect or --verify to look at SRC alone")
    try:
        run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    out = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    path = release.locate(args.source)
    if args.inspect:
        tensors, _ = io.read_tensors(path)
        out.print(listing.render(tensors, flax=io.format_of(path) == io.ORBAX))
    if not (args.destination or args.verify):
        return
    source = _configured(io.read(path), args)
    written = source
    if args.destination:
        io.write(args.destination, source, overwrite=args.overwrite)
        out.print(
            f"{args.destination}: {len(source.tensors)} tensors written{_kept(args.destination, source)}",
            soft_wrap=True,
        )
        written = Checkpoint(io.read(args.destination).tensors, source.config)
    if args.verify:
        difference = verify.largest_difference(source, written)
        out.print(f"largest difference between PyTorch and Flax: {difference:.2e}")
        if not difference <= verify.TOLERANCE:
            raise ValueError(f"the frameworks differ by {difference:.2e}, more than {verify.TOLERANCE:.0e}.")


def _kept(destination: str, checkpoint: Checkpoint) -> str:
    """Say what became of the settings that the weights do not tell."""
    settings = ", ".join(f"{name}={checkpoint.config[name]}" for name in SETTINGS)
    if io.format_of(destination) == io.TORCH:
        return f"; a state dict does not keep {settings}"
    return f", with {settings}"


def _configured(checkpoint: Checkpoint, args: argparse.Namespace) -> Checkpoint:
    """Complete the configuration with the options and with the defaults. Raises ValueError for an impossible one."""
    from anyup_jax.config import AnyUpConfig

    given = {name: getattr(args, name) for name in SETTINGS}
    fields = checkpoint.configured(**{name: value for name, value in given.items() if value is not None})
    return Checkpoint(checkpoint.tensors, dataclasses.asdict(AnyUpConfig().replace(**fields)))


if __name__ == "__main__":
    sys.exit(main())
