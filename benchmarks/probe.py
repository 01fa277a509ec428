"""A step of a linear probe: the head on upsampled features, and the head's logits upsampled; a process for each run."""

from __future__ import annotations

import dataclasses
import json
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
        kept: the weights of AnyUp's averages were computed before, as with `cache=` of an evaluation.
        plain: upsample the features and apply the head to them; otherwise the other way round.
        classes: of the head.
        batch, image, cells, channels: of the images and of the features.
        steps: timed ones, after a first.
    """

    kept: bool
    plain: bool
    classes: int
    batch: int = 2
    image: int = 224
    cells: int = 16
    channels: int = 384
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job measured: loss and gradient of the head, seconds of the steps, and megabytes the program needs."""

    loss: float
    gradient: list[list[float]]
    seconds: list[float]
    temporary: float


SIZES = dict(batch=2, image=224, cells=16, channels=384)
CLASSES = (21, 151)


def probe(rounds: int) -> Table:
    """Seconds and memory of a probe's step with the head applied at low resolution, and on upsampled features."""
    sizes = "batch {batch}, {image}², features {cells}² x {channels}".format(**SIZES)
    title = f"a step of a linear probe behind AnyUp: {sizes}; medians of {rounds} turns"
    columns = "s / step", "program's MB", "faster", "memory", "loss differs by", "gradient differs by"
    table = table_of(title, "classes, AnyUp, head applied", *columns)
    for classes in CLASSES:
        for kept in (False, True):
            turns = [[measure(Job(kept, plain, classes, **SIZES)) for plain in (True, False)] for _ in range(rounds)]
            faster = np.median([np.median(a.seconds) / np.median(b.seconds) for a, b in turns])
            smaller = np.median([b.temporary / a.temporary for a, b in turns])
            gradients = [[np.array(outcome.gradient) for outcome in pair] for pair in turns]
            apart = max(np.abs(a - b).max() / np.abs(a).max() for a, b in gradients)
            loss = max(abs(a.loss - b.loss) for a, b in turns)
            for number, where in enumerate(("to upsampled features", "to features")):
                chosen = [pair[number] for pair in turns]
                seconds = np.median([np.median(o.seconds) for o in chosen])
                row = [f"{seconds:.3f}", f"{np.median([o.temporary for o in chosen]):.0f}"]
                row += [f"{faster:.2f} x", f"{smaller:.2f}", f"{loss:.1e}", f"{apart:.1e}"] if number else [""] * 4
                table.add_row(f"{classes}, {'kept' if kept else 'computed'}, {where}", *row)
        table.add_section()
    table.caption = (
        "computed: AnyUp runs in every step; kept: the weights of its averages were kept (cache=). The program's "
        "MB are its temporary arrays. Gradient: largest difference, relative to the largest value."
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
    from evaluation import kept_weights
    from evaluation.methods import Upsampler
    from evaluation.segmentation import cross_entropy, init_head

    method = Upsampler(anyup_jax.AnyUp(rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    image = random.random((job.batch, job.image, job.image, 3), np.float32)
    features = random.standard_normal((job.batch, job.cells, job.cells, job.channels), np.float32)
    labels = random.integers(0, job.classes, (job.batch, job.image, job.image)).astype(np.uint8)
    size = job.image, job.image
    data, plan = dict(image=image, features=features), None
    if job.kept:
        plan = kept_weights.Plan.of(method, features.shape[1:3], size)
        tiles = kept_weights.extract(method, dict(it=plan), jnp.asarray(image), dict(it=jnp.asarray(features)), size)[
            "it"
        ]
        data, labels = dict(features=features, tiles=tiles), np.asarray(plan.pick(labels[..., None]))[..., 0]

    def upsample(data, values):
        if plan is not None:
            return kept_weights.apply(plan, data["tiles"], values)
        return method(data["image"], data["features"], size, values)

    def step(head, data):
        def loss(head):
            if job.plain:
                logits = upsample(data, data["features"]) @ head["weight"]
            else:
                logits = upsample(data, data["features"] @ head["weight"])
            return cross_entropy(logits + head["bias"], jnp.asarray(labels), 255)

        return jax.value_and_grad(loss)(head)

    head, seconds = init_head(job.channels, job.classes, 0), []
    data = jax.tree.map(jnp.asarray, data)
    compiled = jax.jit(step).lower(head, data).compile()
    for _ in range(1 + job.steps):
        start = time.perf_counter()
        loss, gradient = jax.block_until_ready(compiled(head, data))
        seconds.append(time.perf_counter() - start)
    temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return Outcome(float(loss), np.asarray(gradient["weight"]).tolist(), seconds[1:], temporary)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(run(Job(**json.loads(sys.argv[1]))))))
