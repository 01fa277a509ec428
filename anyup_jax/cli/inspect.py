"""`anyup inspect`: the tensors of a checkpoint."""

from __future__ import annotations

import argparse

from anyup_core.paths import expanded
from anyup_jax.cli.convert import console, list_tensors


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("inspect", help="list the tensors of a checkpoint", description=inspect.__doc__)
    parser.set_defaults(command=inspect)
    parser.add_argument("source", type=expanded, metavar="SRC", help="a file, a directory or the name of a checkpoint")
    parser.add_argument("--encoder", metavar="NAME", help="timm's name of the encoder, where SRC does not carry it")


def inspect(args: argparse.Namespace) -> None:
    """List the tensors of a checkpoint of AnyUp or of an encoder beside their counterparts in the other framework."""
    list_tensors(args.source, args.encoder, console())
