"""Print the benchmarks' tables: `python -m benchmarks.run [NAME ...] [--rounds N]`."""

from __future__ import annotations

import argparse

from rich.console import Console

from benchmarks.accuracy import accuracy
from benchmarks.attention import attention
from benchmarks.bands import bands
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
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in TABLES]:
        parser.error(f"no benchmark named {', '.join(unknown)}; choose from {', '.join(TABLES)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    console = Console(width=130)
    for name in args.names or TABLES:
        try:
            console.print(TABLES[name](args.rounds))
        except (ImportError, FileNotFoundError) as error:  # something optional is not there
            if args.names:
                parser.error(f"{name}: {error}")
            console.print(f"{name}: left out. {error}", markup=False)


if __name__ == "__main__":
    main()
