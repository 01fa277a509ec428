"""A step of a linear probe: the head on upsampled features, and the head's logits upsampled; a process for each run."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time

import numpy as np
from rich.table import Table

from benchmarks.encoders import in_process
from benchmarks.tables import table_of


@dataclasses.dataclass(frozen=True)
class Job:
    """Steps to time: square sizes, float32, random images, features, labels and weights.

    Attributes:
        plain: upsample the features and apply the head to them; otherwise the other way round.
        classes: of the head.
        batch, image, cells, channels: of the images and of the features.
        steps: timed ones, after a first, which compiles.
    """

    plain: bool
    classes: int
    batch: int = 2
    image: int = 224
    cells: int = 16
    channels: int = 384
    steps: int = 2


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job measured: loss and gradient of the head, seconds of the steps, and peak megabytes."""

    loss: float
    gradient: list[list[float]]
    seconds: list[float]
    peak: float


SIZES = dict(batch=2, image=224, cells=16, channels=384)
CLASSES = (21, 151)


def probe(rounds: int) -> Table:
    """Seconds and peak memory of a probe's step with the head applied at low resolution, and on upsampled features."""
    sizes = "batch {batch}, {image}², features {cells}² x {channels}".format(**SIZES)
    title = f"a step of a linear probe behind AnyUp: {sizes}; medians of {rounds} turns"
    columns = "s / step", "peak MB", "faster", "memory", "loss differs by", "gradient differs by"
    table = table_of(title, "classes, head applied", *columns)
    for classes in CLASSES:
        turns = [[measure(Job(plain, classes, **SIZES)) for plain in (True, False)] for _ in range(rounds)]
        faster = np.median([np.median(a.seconds) / np.median(b.seconds) for a, b in turns])
        smaller = np.median([b.peak / a.peak for a, b in turns])
        gradients = [[np.array(outcome.gradient) for outcome in pair] for pair in turns]
        apart = max(np.abs(a - b).max() / np.abs(a).max() for a, b in gradients)
        loss = max(abs(a.loss - b.loss) for a, b in turns)
        for number, where in enumerate(("to upsampled features", "to features (values=)")):
            chosen = [pair[number] for pair in turns]
            row = [
                f"{np.median([np.median(o.seconds) for o in chosen]):.2f}",
                f"{np.median([o.peak for o in chosen]):.0f}",
            ]
            row += [f"{faster:.2f} x", f"{smaller:.2f}", f"{loss:.1e}", f"{apart:.1e}"] if number else [""] * 4
            table.add_row(f"{classes}, {where}", *row)
        table.add_section()
    table.caption = (
        "faster, memory: how many times as fast, and the share of the peak memory, which holds the framework, the "
        "compiler and AnyUp's own maps. Gradient: largest difference, relative to the largest value."
    )
    return table


def measure(job: Job) -> Outcome:
    """Run a job in a new process and return what it measured. Raises RuntimeError if it did not end well."""
    return Outcome(**in_process([json.dumps(dataclasses.asdict(job))], module="benchmarks.probe"))


def run(job: Job) -> Outcome:
    """Time a job in this process."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import anyup_jax
    from evaluate.methods import Upsampler
    from evaluate.segmentation import cross_entropy, init_head

    method = Upsampler(anyup_jax.AnyUp(rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    image = random.random((job.batch, job.image, job.image, 3), np.float32)
    features = random.standard_normal((job.batch, job.cells, job.cells, job.channels), np.float32)
    labels = random.integers(0, job.classes, (job.batch, job.image, job.image)).astype(np.uint8)
    size = job.image, job.image

    @jax.jit
    def step(head, image, features):
        def loss(head):
            if job.plain:
                logits = method(image, features, size) @ head["weight"]
            else:
                logits = method(image, features, size, features @ head["weight"])
            return cross_entropy(logits + head["bias"], jnp.asarray(labels), 255)

        return jax.value_and_grad(loss)(head)

    head, seconds = init_head(job.channels, job.classes, 0), []
    for _ in range(1 + job.steps):
        start = time.perf_counter()
        loss, gradient = jax.block_until_ready(step(head, image, features))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return Outcome(float(loss), np.asarray(gradient["weight"]).tolist(), seconds[1:], peak)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(run(Job(**json.loads(sys.argv[1]))))))
