"""python -m convert SRC DST: the command `anyup convert`, here with `--verify` and `--training`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from anyup_jax.cli.convert import TEXTS, add_arguments
from anyup_jax.cli.convert import convert as run
from anyup_jax.cli.parser import Parser, execute
from convert import training_state, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after printing what was wrong."""
    parser = Parser(prog="python -m convert", **TEXTS)
    add_arguments(parser)
    parser.set_defaults(command=functools.partial(run, verify=verify.compare, convert_run=training_state.convert))
    return execute(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
