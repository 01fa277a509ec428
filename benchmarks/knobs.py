"""What `q_chunk_size` and `window_ratio` do to memory and time, in both frameworks."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from benchmarks.tables import table_of
from benchmarks.worker import Job, measure

SETTINGS = (
    dict(), dict(chunk=4096), dict(chunk=512), dict(ratio=0.05), dict(ratio=0.2), dict(ratio=0.0),
)  # fmt: skip


def knobs(rounds: int) -> Table:
    """448 x 448, 32 x 32, C = 384, `tiled`: seconds and peak memory by `q_chunk_size` and `window_ratio`."""
    title = f"448 x 448 px, 32 x 32 cells, C = 384, float32, CPU; medians of {rounds} rounds"
    table = table_of(title, "", "q_chunk_size", "window_ratio", "seconds", "/ default", "peak MB")
    for framework in ("jax", "torch"):
        jobs = [Job(framework, repeats=2, **changes) for changes in SETTINGS]
        turns = [[measure(job) for job in jobs] for _ in range(rounds)]
        for job, outcomes in zip(jobs, zip(*turns)):
            seconds = np.array([np.median(outcome.seconds) for outcome in outcomes])
            default = np.array([np.median(turn[0].seconds) for turn in turns])
            peak = np.median([outcome.peak for outcome in outcomes])
            cells = str(job.chunk), f"{job.ratio:g}", f"{np.median(seconds):.2f}", f"{np.median(seconds / default):.2f}"
            table.add_row(framework, *cells, f"{peak:.0f}")
    table.caption = "window_ratio=0 is every key; the framework and the compiler are in the peak"
    return table
