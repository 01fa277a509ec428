"""One measurement in a process of its own, so that its peak memory is its own: `python -m benchmarks.worker JSON`."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

MATMUL = 2048  # side of the square matrices whose product gives the machine's arithmetic rate


@dataclasses.dataclass(frozen=True)
class Job:
    """A forward pass to time: square sizes, batch 1, float32, random weights and inputs.

    Attributes:
        framework: "jax" or "torch".
        backend: attention backend; "published" is the published algorithm, in PyTorch.
        image, cells, channels: sides of the image and of the feature map, and its channels.
        chunk: `q_chunk_size`.
        ratio: `window_ratio`; 0 for every key.
        repeats: timed runs after the first, which compiles.
    """

    framework: str
    backend: str = "tiled"
    image: int = 448
    cells: int = 32
    channels: int = 384
    chunk: int | None = None
    ratio: float = 0.1
    repeats: int = 3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job measured: seconds of the runs, seconds of the first, peak megabytes, and GFLOP/s of the matmul."""

    seconds: list[float]
    first: float
    peak: float
    rate: float


def measure(job: Job, **variables: str) -> Outcome:
    """Run a job in a new process, whose environment has these variables too, and return what it measured.

    Raises RuntimeError if it did not end well.
    """
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(job))]
    environment = {**os.environ, **variables}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{job} ended with status {process.returncode}: {process.stderr.strip()[-500:]}")
    return Outcome(**json.loads(process.stdout.splitlines()[-1]))


def run(job: Job) -> Outcome:
    """Time a job in this process."""
    forward, matmul = (jax_calls if job.framework == "jax" else torch_calls)(job)
    first = timed(forward)
    seconds, rates = [], []
    for _ in range(job.repeats):
        seconds.append(timed(forward))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    timed(matmul)
    for index in range(job.repeats):  # the rate is taken between further runs, on the machine as it is then
        rates += [2 * MATMUL**3 / timed(matmul) / 1e9 for _ in range(3)]
        if index + 1 < job.repeats:
            seconds.append(timed(forward))
    return Outcome(seconds, first, peak, float(np.median(rates)))


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def inputs(job: Job) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    image = random.standard_normal((1, job.image, job.image, 3), dtype=np.float32)
    return image, random.standard_normal((1, job.cells, job.cells, job.channels), dtype=np.float32)


def jax_calls(job: Job) -> tuple[Callable[[], None], Callable[[], None]]:
    import jax
    from flax import nnx

    import anyup_jax

    model = anyup_jax.AnyUp(anyup_jax.AnyUpConfig(backend=job.backend, window_ratio=job.ratio), rngs=nnx.Rngs(0))
    image, features = map(jax.numpy.asarray, inputs(job))
    multiply = jax.jit(lambda a: a @ a)

    def forward() -> None:
        anyup_jax.upsample(model, image, features, q_chunk_size=job.chunk).block_until_ready()

    def matmul() -> None:
        multiply(jax.numpy.ones((MATMUL, MATMUL))).block_until_ready()

    return forward, matmul


def torch_calls(job: Job) -> tuple[Callable[[], None], Callable[[], None]]:
    import torch

    import anyup_torch
    from benchmarks.published import with_published_attention

    torch.manual_seed(0)
    published = job.backend == "published"
    model = anyup_torch.AnyUp(backend="dense" if published else job.backend, window_ratio=job.ratio).eval()
    model = with_published_attention(model) if published else model
    image, features = (torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() for array in inputs(job))

    @torch.inference_mode()
    def forward() -> None:
        model(image, features, q_chunk_size=job.chunk)

    def matmul() -> None:
        matrix = torch.ones(MATMUL, MATMUL)
        _ = matrix @ matrix

    return forward, matmul


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(run(Job(**json.loads(sys.argv[1]))))))
