"""How long a call takes beside processes that want the same processors: shared servers, data loaders, containers."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from rich.table import Table

from anyup_torch.threads import processors
from benchmarks.tables import table_of
from benchmarks.worker import Job, Outcome, measure

SIZES = dict(image=224, cells=14, channels=320)
ROWS: dict[str, tuple[Job, dict[str, str]]] = {
    "jax tiled": (Job("jax", **SIZES), {}),
    "torch tiled": (Job("torch", **SIZES), {}),
    "torch tiled, OMP_WAIT_POLICY=PASSIVE": (Job("torch", **SIZES), {"OMP_WAIT_POLICY": "PASSIVE"}),
    "torch published, q_chunk_size=2048": (Job("torch", "published", **SIZES, chunk=2048), {}),
}


def busy(rounds: int) -> Table:
    """224 x 224, 14 x 14, C = 320: seconds of a call on this machine, and beside two busy processes a processor."""
    processes = 2 * processors()
    outcomes: dict[str, tuple[list[Outcome], list[Outcome]]] = {name: ([], []) for name in ROWS}
    for _ in range(rounds):
        for name, (job, variables) in ROWS.items():
            outcomes[name][0].append(measure(job, **variables))
            with beside(processes):
                outcomes[name][1].append(measure(job, **variables))
    title = (
        f"a call beside {processes} busy processes, 224 x 224 px, 14 x 14 cells, C = 320; medians of {rounds} rounds"
    )
    table = table_of(title, "", "alone s", "busy s", "slowest busy s", "busy / alone", "busy / jax busy")
    every = {name: [np.array([o.seconds for o in each]) for each in both] for name, both in outcomes.items()}
    reference = np.median(every["jax tiled"][1], axis=1)
    for name, (alone, shared) in every.items():
        medians = [np.median(seconds, axis=1) for seconds in (alone, shared)]
        table.add_row(
            name,
            f"{np.median(alone):.2f}",
            f"{np.median(shared):.2f}",
            f"{shared.max():.2f}",
            f"{np.median(medians[1] / medians[0]):.1f}",
            f"{np.median(medians[1] / reference):.1f}",
        )
    table.caption = "alone: as far as this machine is; ratios are taken round by round"
    return table


@contextlib.contextmanager
def beside(processes: int) -> Iterator[None]:
    """Keep so many processes busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(1)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
