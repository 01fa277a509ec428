"""The whole forward pass: speed against the reference's algorithm, against the arithmetic, by resolution; memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from rich.table import Table

from benchmarks.stages import STAGES, gflop
from benchmarks.tables import table_of
from benchmarks.worker import Job, Outcome, measure

GFLOP = 161.0  # of the forward pass at 448 x 448 pixels, 32 x 32 cells, 384 channels
CHUNKS = (512, 2048, 8192)
PUBLISHED_LIMIT = 448  # pixels a side; at 896 its scores alone take 53 GB
SIDES = (224, 448, 896, 1344)


def forward(rounds: int) -> Table:
    """448 x 448, 32 x 32, C = 384: both frameworks' `tiled` against the published algorithm and against `dense`."""
    slow = {(backend, chunk): [] for backend in ("published", "dense") for chunk in CHUNKS}
    tiled = {"jax": [], "torch": []}
    for _ in range(rounds):
        for (backend, chunk), outcomes in slow.items():
            outcomes.append(measure(Job("torch", backend, chunk=chunk, repeats=1)))
        for framework, outcomes in tiled.items():
            outcomes.append(measure(Job(framework, repeats=3)))
    best = {
        backend: min((outcomes for (name, _), outcomes in slow.items() if name == backend), key=median_seconds)
        for backend in ("published", "dense")
    }
    title = f"forward, 448 x 448 px, 32 x 32 cells, C = 384, float32, CPU; medians of {rounds} rounds, paired by round"
    columns = ("seconds", "published / this", "dense / this", "/ arithmetic", "peak MB", "first run s")
    table = table_of(title, "", *columns)
    for (backend, chunk), outcomes in slow.items():
        add_row(table, f"torch {backend}, q_chunk_size={chunk}", outcomes, best.values())
    for framework, outcomes in tiled.items():
        add_row(table, f"{framework} tiled", outcomes, best.values())
    rate = np.median([outcome.rate for outcomes in tiled.values() for outcome in outcomes])
    table.caption = (
        "published: nn.MultiheadAttention under a mask, for its weights; dense: the same without what is thrown away; "
        f"ratios are to the best chunk of each; arithmetic: {GFLOP:.0f} GFLOP at the rate of a 2048^3 matmul in that "
        f"process ({rate:.0f} GFLOP/s)"
    )
    return table


def median_seconds(outcomes: list[Outcome]) -> float:
    return float(np.median([np.median(outcome.seconds) for outcome in outcomes]))


def add_row(table: Table, name: str, outcomes: list[Outcome], baselines: Iterable[list[Outcome]]) -> None:
    seconds = [np.median(outcome.seconds) for outcome in outcomes]
    speedups = (np.median([np.median(base.seconds) / s for base, s in zip(each, seconds)]) for each in baselines)
    arithmetic = np.median([s * outcome.rate / GFLOP for s, outcome in zip(seconds, outcomes)])
    peak, first = (np.median([getattr(outcome, name) for outcome in outcomes]) for name in ("peak", "first"))
    cells = (*speedups, arithmetic)
    table.add_row(name, f"{np.median(seconds):.2f}", *(f"{x:.2f}" for x in cells), f"{peak:.0f}", f"{first:.1f}")


def scaling(rounds: int) -> Table:
    """Time per output pixel by resolution, at 14 pixels a cell."""
    title = f"time per output pixel at 14 pixels a cell, C = 384; medians of {rounds} rounds"
    table = table_of(title, "", *(f"{side} px" for side in SIDES), "largest / smallest")
    jobs = [Job("jax", image=side, cells=side // 14, repeats=2) for side in SIDES]
    exact = np.array([sum(gflop(stage, job) for stage in STAGES) / job.image**2 for job in jobs])
    for framework in ("jax", "torch"):
        runs = [[measure(dataclasses.replace(job, framework=framework)) for job in jobs] for _ in range(rounds)]
        each = np.median([[np.median(o.seconds) / side**2 for o, side in zip(row, SIDES)] for row in runs], axis=0)
        cells = (f"{seconds * 1e6:.2f} us" for seconds in each)
        table.add_row(f"{framework} tiled", *cells, f"{each.max() / each.min():.2f}")
    table.add_row("arithmetic", *(f"{x * 1e3:.2f} MFLOP" for x in exact), f"{exact.max() / exact.min():.2f}")
    table.caption = (
        "arithmetic: the least there is to do; a window is a tenth of the feature map to each side and grows with it"
    )
    return table


def memory(rounds: int) -> Table:
    """Peak memory by resolution, at 14 pixels a cell, beside the published algorithm's and what its scores take."""
    title = "peak MB of a process that upsamples once, C = 384, float32, CPU, by the side of image and output"
    table = table_of(title, "", *(f"{side} px" for side in SIDES))
    for framework, backend in (("jax", "tiled"), ("torch", "tiled"), ("torch", "published")):
        cells = []
        for side in SIDES:
            fits = backend == "tiled" or side <= PUBLISHED_LIMIT
            job = Job(framework, backend, image=side, cells=side // 14, repeats=1)
            cells.append(f"{measure(job).peak:.0f}" if fits else "not run")
        table.add_row(f"{framework} {backend}", *cells)
    output = [side**2 * 384 * 4 / 1e6 for side in SIDES]
    scores = [side**2 * (side // 14) ** 2 * 4 * 4 / 1e6 for side in SIDES]
    table.add_row("the output alone", *(f"{x:.0f}" for x in output))
    table.add_row("published: scores alone", *(f"{x:.0f}" for x in scores))
    table.caption = (
        "scores: of every pixel with every cell, for four heads, of which the published algorithm holds several copies "
        "unless the caller sets q_chunk_size; nothing is set here. The peak holds the framework and the compiler."
    )
    return table


def large(rounds: int) -> Table:
    """1792 x 1792 pixels, 128 x 128 cells, C = 384, with nothing set by the caller: 4.9 GB of output."""
    table = table_of("forward, 1792 x 1792 px, 128 x 128 cells, C = 384, float32", "", "seconds", "peak MB")
    for framework in ("jax", "torch"):
        outcome = measure(Job(framework, "auto", image=1792, cells=128, repeats=1))
        table.add_row(framework, f"{np.median(outcome.seconds):.1f}", f"{outcome.peak:.0f}")
    return table
