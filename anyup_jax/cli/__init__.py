"""The command `anyup`, also `python -m anyup_jax`: `demo upsample convert inspect export app`, one file each.

A command imports jax, matplotlib or PyTorch only after its arguments have been checked, and only if it needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

from anyup_core import __version__
from anyup_jax.cli import app, convert, demo, export, inspect, upsample
from anyup_jax.cli.parser import Parser, execute


def main(argv: Sequence[str] | None = None, *, prog: str = "anyup") -> int:
    """Run a command and return its exit status: 0, 2 after one line on stderr that says what was wrong, or 128 + the
    number of the signal that interrupted it.
    """
    parser = Parser(prog=prog, description="AnyUp: features of any vision encoder at any resolution.")
    parser.add_argument("--version", action="version", version=f"anyup {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, upsample, convert, inspect, export, app):
        command.add_to(commands)
    return execute(parser, argv)
