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


def whole(text: str, least: int, most: int, kind: str = "whole number") -> int:
    """Return an integer of this range. Raises ArgumentTypeError for anything else."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a {kind} from {least} to {most}")
    return value


def positive(text: str) -> int:
    return whole(text, 1, 2**31 - 1, "positive integer")


def index(text: str) -> int:
    return whole(text, -(2**31), 2**31 - 1)


def seed(text: str) -> int:
    return whole(text, 0, 2**63 - 1)


def add_models(parser: argparse.ArgumentParser, layers: str) -> None:
    """Add the options of the encoder and of AnyUp; `layers` says what becomes of several layers."""
    encoder = parser.add_argument_group("encoder")
    names = "timm's name of a Flax encoder, or timm:NAME for any timm model, which needs PyTorch"
    encoder.add_argument("--encoder", metavar="NAME", help=f"{names} (default: {ENCODER})")
    encoder.add_argument(
        "--layer", type=index, action="append", metavar="I", help=f"block or stage; may be repeated: {layers}"
    )
    encoder.add_argument("--encoder-weights", type=expanded, metavar="FILE", help="default: the pretrained weights")
    model = parser.add_argument_group("AnyUp")
    weights = 'a name, a file, or "random" (default: %(default)s; anyup_multi_backbone for DINO and its like)'
    model.add_argument("--weights", type=expanded, default=WEIGHTS, metavar="W", help=weights)
    model.add_argument("--seed", type=seed, default=0, metavar="N", help="of random weights (default: 0)")
    model.add_argument("--window", choices=("paper", "natten"), help="which keys a query sees")
    model.add_argument("--backend", metavar="NAME", help="how attention is computed")
    model.add_argument("--q-chunk-size", type=positive, metavar="N", help="query positions worked on at once")
