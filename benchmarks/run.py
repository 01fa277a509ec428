"""Print the benchmarks' tables: `python -m benchmarks.run [NAME ...] [--rounds N] [--json FILE]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from anyup_core.replacement import replacing
from benchmarks import record
from benchmarks.accuracy import accuracy
from benchmarks.attention import attention
from benchmarks.bands import bands
from benchmarks.busy import busy
from benchmarks.data import data
from benchmarks.encoders import encoders, encoders_tpu
from benchmarks.export import export
from benchmarks.forward import forward, large, memory, scaling
from benchmarks.gpu import gpu
from benchmarks.knobs import knobs
from benchmarks.many import many
from benchmarks.pod import pod
from benchmarks.probe import probe
from benchmarks.stages import stages
from benchmarks.tpu import tpu, tpu_rows
from benchmarks.train import train
from benchmarks.upsamplers import upsampler_sizes, upsamplers
from benchmarks.windows import windows

TABLES = {
    table.__name__: table
    for table in (
        forward,
        stages,
        scaling,
        memory,
        large,
        bands,
        busy,
        many,
        export,
        knobs,
        attention,
        windows,
        upsamplers,
        upsampler_sizes,
        accuracy,
        encoders,
        encoders_tpu,
        tpu,
        tpu_rows,
        gpu,
        train,
        data,
        probe,
        pod,
    )
}


def main(argv: list[str] | None = None) -> None:
    """Print the named tables, all of them by default, in this order."""
    lines = "\n".join(f"  {name:<10}{(table.__doc__ or name).splitlines()[0]}" for name, table in TABLES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=f"Benchmarks on this machine:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="tables to print (default: all)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="repetitions (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them to a file too, with what they depend on")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in TABLES]:
        parser.error(f"no benchmark named {', '.join(unknown)}; choose from {', '.join(TABLES)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f"--json {args.json}: there is no such folder")
    console = Console(width=130)
    written = dict(machine=record.machine(), rounds=args.rounds, tables={})
    for name in args.names or TABLES:
        try:
            table = TABLES[name](args.rounds)
            console.print(table)
            written["tables"][name] = record.as_json(table)
            if args.json is not None:  # after every table: a later one may be stopped
                with replacing(args.json) as temporary:
                    temporary.write_text(json.dumps(written, indent=1) + "\n")
        except (ImportError, FileNotFoundError) as error:  # something optional is not there
            if args.names:
                parser.error(f"{name}: {error}")
            console.print(f"{name}: left out. {error}", markup=False)


if __name__ == "__main__":
    main()
