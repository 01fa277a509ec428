"""`python -m tools.fair_table train|evaluate|report DATA OUT`: AnyUp, JAFAR, NAF and FeatUp trained alike, compared.

Every run is one command of `train.run` or `evaluation.run`, and `commands` prints them. `train` and `evaluate` skip
what is complete and resume what is not: the same command goes on after a stop. DATA holds `photos/train` and `cutouts`.
`report` writes a page on all that is complete, and leaves out the rest.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from anyup_core import command
from anyup_core.files import replacing
from anyup_core.paths import user_path
from tools import fair_page
from tools.fair_runs import SEEDS, evaluate, of_seed, train


def execute(runs: Iterable[list[str]]) -> int:
    """Do runs one after the other; return the exit status of the first one that fails, or 0.

    A run is given the time to save when this process is interrupted.
    """
    for run in runs:
        print("python -m", shlex.join(run), flush=True)
        with subprocess.Popen([sys.executable, "-m", *run]) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                raise
        if status:
            return status
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says and return the exit status, see `anyup_core.command`."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fair_table", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("what", choices=["commands", "train", "evaluate", "report"])
    parser.add_argument("data", type=user_path, metavar="DATA", help="the folder with photos/train and cutouts")
    parser.add_argument("out", type=user_path, metavar="OUT", help="the folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="default: 0 1 2")
    parser.add_argument("--page", type=user_path, default=Path("docs/fair_table.md"), help="of report")

    def work() -> int:
        args = parser.parse_args(argv)
        if args.what == "commands":
            runs = (run for seed in args.seeds for run in of_seed(args.data, args.out, seed))
            print(*("python -m " + shlex.join(run) for run in runs), sep="\n")
            return 0
        if args.what == "report":
            text = fair_page.page(args.out, args.seeds)
            args.page.parent.mkdir(parents=True, exist_ok=True)
            with replacing(args.page) as temporary:
                temporary.write_text(text)
            print(f"written: {args.page}")
            return 0
        args.out.mkdir(parents=True, exist_ok=True)  # for the size index, which all runs share
        missing = train if args.what == "train" else evaluate
        return execute(missing(args.data, args.out, args.seeds))

    return command.execute(work, hint="the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
