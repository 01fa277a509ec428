"""Arguments that commands share, and how a command fails."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from anyup_core import command
from anyup_core.paths import expanded

ENCODER = "efficientnet_lite0"
WEIGHTS, RANDOM = "anyup_efficientnet_lite", "random"


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def execute(parser: Parser, argv: Sequence[str] | None) -> int:
    """Call `args.command(args)`. Return the exit status, see `anyup_core.command`."""

    def work() -> None:
        args = parser.parse_args(argv)
        args.command(args)

    return command.execute(work, TypeError)


def positive(text: str) -> int:
    """Return a positive integer. Raises ArgumentTypeError for anything else."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def add_models(parser: argparse.ArgumentParser, layers: str) -> None:
    """Add the options of the encoder and of AnyUp; `layers` says what becomes of several layers."""
    encoder = parser.add_argument_group("encoder")
    names = "timm's name of a Flax encoder, or timm:NAME for any timm model, which needs PyTorch"
    encoder.add_argument("--encoder", metavar="NAME", help=f"{names} (default: {ENCODER})")
    encoder.add_argument(
        "--layer", type=int, action="append", metavar="I", help=f"block or stage; may be repeated: {layers}"
    )
    encoder.add_argument("--encoder-weights", type=expanded, metavar="FILE", help="default: the pretrained weights")
    model = parser.add_argument_group("AnyUp")
    weights = 'a name, a file, or "random" (default: %(default)s; anyup_multi_backbone for DINO and its like)'
    model.add_argument("--weights", type=expanded, default=WEIGHTS, metavar="W", help=weights)
    model.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights (default: 0)")
    model.add_argument("--window", choices=("paper", "natten"), help="which keys a query sees")
    model.add_argument("--backend", metavar="NAME", help="how attention is computed")
    model.add_argument("--q-chunk-size", type=positive, metavar="N", help="query positions worked on at once")
