"""The whole forward pass: speed against the reference's algorithm, against the arithmetic, by resolution; memory."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from benchmarks.worker import Job, measure

GFLOP = 161.0  # of the forward pass at 448 x 448 pixels, 32 x 32 cells, 384 channels
CHUNKS = (512, 2048, 8192)
SIDES = (224, 448, 896, 1344)


def forward(rounds: int) -> Table:
    """448 x 448, 32 x 32, C = 384: both frameworks' `tiled` against PyTorch's `dense` with its best chunk."""
    dense, tiled = {chunk: [] for chunk in CHUNKS}, {"jax": [], "torch": []}
    for _ in range(rounds):
        for chunk in CHUNKS:
            dense[chunk].append(measure(Job("torch", "dense", chunk=chunk, repeats=1)))
        for framework, outcomes in tiled.items():
            outcomes.append(measure(Job(framework, repeats=3)))
    best = min(CHUNKS, key=lambda chunk: np.median([np.median(outcome.seconds) for outcome in dense[chunk]]))
    title = f"forward, 448 x 448 px, 32 x 32 cells, C = 384, float32, CPU; medians of {rounds} rounds, paired by round"
    table = table_of(title, "", "seconds", "dense / this", "/ arithmetic", "peak MB", "first run s")
    for chunk, outcomes in dense.items():
        add_row(table, f"torch dense, q_chunk_size={chunk}", outcomes, dense[best])
    for framework, outcomes in tiled.items():
        add_row(table, f"{framework} tiled", outcomes, dense[best])
    table.caption = (
        f"dense is the reference's algorithm, with its best chunk ({best}); arithmetic: {GFLOP:.0f} GFLOP at the rate "
        f"of a 2048^3 matmul in that process ({np.median([o.rate for os in tiled.values() for o in os]):.0f} GFLOP/s)"
    )
    return table


def add_row(table: Table, name: str, outcomes: list, baseline: list) -> None:
    seconds = [np.median(outcome.seconds) for outcome in outcomes]
    speedup = np.median([np.median(base.seconds) / s for base, s in zip(baseline, seconds)])
    arithmetic = np.median([s * outcome.rate / GFLOP for s, outcome in zip(seconds, outcomes)])
    peak, first = (np.median([getattr(outcome, name) for outcome in outcomes]) for name in ("peak", "first"))
    table.add_row(
        name, f"{np.median(seconds):.2f}", f"{speedup:.2f}", f"{arithmetic:.2f}", f"{peak:.0f}", f"{first:.1f}"
    )


def scaling(rounds: int) -> Table:
    """Time per output pixel by resolution, at 14 pixels a cell."""
    title = f"time per output pixel at 14 pixels a cell, C = 384; medians of {rounds} rounds"
    table = table_of(title, "", *(f"{side} px" for side in SIDES), "largest / smallest")
    for framework in ("jax", "torch"):
        runs = [
            [measure(Job(framework, image=side, cells=side // 14, repeats=2)) for side in SIDES] for _ in range(rounds)
        ]
        each = np.median([[np.median(o.seconds) / side**2 for o, side in zip(row, SIDES)] for row in runs], axis=0)
        cells = (f"{seconds * 1e6:.2f} us" for seconds in each)
        table.add_row(f"{framework} tiled", *cells, f"{each.max() / each.min():.2f}")
    return table


def large(rounds: int) -> Table:
    """1792 x 1792 pixels, 128 x 128 cells, C = 384, with nothing set by the caller: 4.9 GB of output."""
    table = table_of("forward, 1792 x 1792 px, 128 x 128 cells, C = 384, float32", "", "seconds", "peak MB")
    for framework in ("jax", "torch"):
        outcome = measure(Job(framework, "auto", image=1792, cells=128, repeats=1))
        table.add_row(framework, f"{np.median(outcome.seconds):.1f}", f"{outcome.peak:.0f}")
    return table


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", min_width=len(title))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
