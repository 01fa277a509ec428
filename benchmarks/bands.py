"""Outputs in bands of rows: peak memory and seconds by the output's height, and against a plain call."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import time

import numpy as np
from rich.table import Table

from benchmarks.tables import table_of

HEIGHTS = (256, 1024, 4096)


@dataclasses.dataclass(frozen=True)
class Job:
    """An output to compute band by band, each dropped at once: batch 1, random weights and inputs, float16 bands.

    `plain` computes the whole output instead, in float32. Everything but the output's height is square.
    """

    framework: str
    height: int
    width: int = 512
    image: int = 448
    cells: int = 32
    channels: int = 384
    plain: bool = False


LARGEST = Job("jax", 4096, 4096, image=1024, cells=64, channels=768)  # 26 GB: `python -m benchmarks.bands`


def bands(rounds: int) -> Table:
    """Peak memory and seconds of float16 bands, 512 columns wide, by the output's height; both frameworks."""
    title = "bands, 448 x 448 px, 32 x 32 cells, C = 384, 512 columns, CPU; one run each"
    table = table_of(title, "", "rows", "output MB", "peak MB", "seconds")
    for framework in ("jax", "torch"):
        for height in HEIGHTS:
            add_row(table, f"{framework} bands", Job(framework, height))
        add_row(table, f"{framework} plain call", Job(framework, 1024, plain=True))
    table.caption = (
        "bands: float16, dropped as they come; seconds include compiling. `python -m benchmarks.bands` measures "
        "4096 x 4096 positions of 768 channels, which takes minutes"
    )
    return table


def add_row(table: Table, name: str, job: Job) -> None:
    size, peak, seconds = measure(job)
    table.add_row(name, str(job.height), f"{size / 1e6:.0f}", f"{peak:.0f}", f"{seconds:.1f}")


def measure(job: Job) -> tuple[int, float, float]:
    """Run a job in a process of its own; return the output's bytes, peak megabytes and seconds."""
    command = [sys.executable, "-m", "benchmarks.bands", json.dumps(dataclasses.asdict(job))]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{job} ended with status {process.returncode}: {process.stderr.strip()[-500:]}")
    return tuple(json.loads(process.stdout.splitlines()[-1]))


def run(job: Job) -> tuple[int, float, float]:
    """Do the same in this process."""
    random = np.random.default_rng(0)
    sizes = ((1, job.image, job.image, 3), (1, job.cells, job.cells, job.channels))
    image, features = (random.standard_normal(size, dtype=np.float32) for size in sizes)
    start = time.perf_counter()
    pieces = (jax_bands if job.framework == "jax" else torch_bands)(job, image, features)
    size = sum(piece.nbytes for piece in pieces)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return size, peak, time.perf_counter() - start


def jax_bands(job: Job, image: np.ndarray, features: np.ndarray):
    import jax
    from flax import nnx

    import anyup_jax

    model, size = anyup_jax.AnyUp(rngs=nnx.Rngs(0)), (job.height, job.width)
    if job.plain:
        return [jax.block_until_ready(anyup_jax.upsample(model, image, features, size))]
    return anyup_jax.upsample_bands(model, image, features, size, dtype=np.float16)


def torch_bands(job: Job, image: np.ndarray, features: np.ndarray):
    import torch

    import anyup_torch

    model, size = anyup_torch.AnyUp().eval(), (job.height, job.width)
    image, features = (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in (image, features))
    if job.plain:
        with torch.inference_mode():
            return [model(image, features, size)]
    return anyup_torch.upsample_bands(model, image, features, size, dtype=torch.float16)


if __name__ == "__main__":
    print(json.dumps(run(Job(**json.loads(sys.argv[1])) if len(sys.argv) > 1 else LARGEST)))
