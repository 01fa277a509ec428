"""A training step on this machine, ours and the published one; each run has a process, and peak memory, of its own."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.encoders import in_process
from benchmarks.tables import table_of

RATE, DECAY = 2e-4, 1e-5
REGULARISATION = 0.1  # weight of the second and of the third term


@dataclasses.dataclass(frozen=True)
class Job:
    """Steps to time: square sizes, float32, random inputs, which stay the same.

    Attributes:
        framework: "jax" or "torch".
        weights: file with the weights to begin from.
        remat: compute the augmented branch again in the gradient (JAX).
        parts: parts the batch is worked on in, one after the other (JAX).
        batch: photographs.
        image: side of the guidance, at which consistency is measured too.
        cells, channels: side of the feature map and of each crop's, and their channels.
        size: side of the upsampled map that the crops lie in.
        crops: for each photograph.
        steps: timed ones, after a first, which compiles.
    """

    framework: str
    weights: str
    remat: bool = False
    parts: int = 1
    batch: int = 2
    image: int = 224
    cells: int = 16
    channels: int = 384
    size: int = 32
    crops: int = 4
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job measured: the loss of every step, seconds of the first and of the others, and peak megabytes."""

    losses: list[float]
    first: float
    seconds: list[float]
    peak: float


SIZES = dict(batch=2, image=224, cells=16, channels=384, size=32, crops=4)  # DINOv2-S/14, 224² views of a 448² crop
CASES = {
    "PyTorch, as published": dict(framework="torch"),
    "JAX": dict(framework="jax"),
    "JAX, remat": dict(framework="jax", remat=True),
    "JAX, accumulate=2": dict(framework="jax", parts=2),
}


def train(rounds: int) -> Table:
    """Seconds and peak memory of a training step (objective, gradient, AdamW), and of the published one in PyTorch."""
    sizes = "batch {batch}, guidance {image}², features {cells}² x {channels} to {size}², {crops} crops".format(**SIZES)
    title = f"a training step on this CPU: {sizes}, float32; medians of {rounds} turns"
    columns = "s / step", "ratio", "peak MB", "ratio", "loss differs by", "first step s"
    table = table_of(title, "", *columns)
    turns: dict[str, list[Outcome]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        weights = str(write_weights(Path(folder, "weights.safetensors")))
        for _ in range(rounds):
            for name, case in CASES.items():
                turns[name].append(measure(Job(**case, **SIZES, weights=weights)))
    theirs = next(iter(turns.values()))
    for name, ours in turns.items():
        pairs = list(zip(theirs, ours))
        faster = np.median([np.median(a.seconds) / np.median(b.seconds) for a, b in pairs])
        smaller = np.median([b.peak / a.peak for a, b in pairs])
        apart = max(abs(x - y) for a, b in pairs for x, y in zip(a.losses, b.losses))
        seconds, peak, first = (
            np.median([measured(outcome) for outcome in ours])
            for measured in (lambda o: np.median(o.seconds), lambda o: o.peak, lambda o: o.first)
        )
        row = f"{seconds:.2f}", f"{faster:.2f} x", f"{peak:.0f}", f"{smaller:.2f}", f"{apart:.1e}", f"{first:.1f}"
        table.add_row(name, *row)
    table.caption = (
        "ratios: how many times as fast as the published step, wanted 3 or more; and the share of its memory, wanted "
        f"0.5 or less. Loss: largest difference over all steps, of about {theirs[0].losses[0]:.2f}. The peak holds the "
        "framework, the compiler and everything else."
    )
    return table


def write_weights(path: Path) -> Path:
    """Write the weights both begin from: PyTorch's initial ones, seed 0."""
    import torch

    import anyup_torch
    import convert

    torch.manual_seed(0)
    state = anyup_torch.AnyUp(anyup_torch.AnyUpConfig()).state_dict()
    return convert.write(path, convert.Checkpoint({name: tensor.numpy() for name, tensor in state.items()}))


def measure(job: Job) -> Outcome:
    """Run a job in a new process and return what it measured. Raises RuntimeError if it did not end well."""
    return Outcome(**in_process([json.dumps(dataclasses.asdict(job))], module="benchmarks.train"))


def run(job: Job) -> Outcome:
    """Time a job in this process."""
    step = (jax_step if job.framework == "jax" else torch_step)(job)
    losses, seconds = [], []
    for _ in range(1 + job.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return Outcome(losses, seconds[0], seconds[1:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def inputs(job: Job) -> Iterator[np.ndarray]:
    """Return guidance, augmented guidance, features, features of the crops, and the crops' corners in cells."""
    random = np.random.default_rng(0)
    cells = (job.cells, job.cells, job.channels)
    for shape in (*[(job.image, job.image, 3)] * 2, cells, (job.crops, *cells)):
        yield random.standard_normal((job.batch, *shape), dtype=np.float32)
    yield random.integers(0, job.size - job.cells + 1, (job.batch, job.crops, 2), dtype=np.int32)


def jax_step(job: Job) -> Callable[[], float]:
    import jax
    from flax import nnx

    import anyup_jax
    from anyup_jax.layers import Unused
    from train import optim
    from train.config import LossConfig, OptimizerConfig
    from train.loss import Views, objective
    from train.step import in_parts

    config, weights = OptimizerConfig(learning_rate=RATE, weight_decay=DECAY), LossConfig()
    graph, parameters, unused = nnx.split(anyup_jax.from_pretrained(job.weights), nnx.Param, Unused)
    views, size = Views(*map(jax.numpy.asarray, inputs(job))), (job.size, job.size)

    def step(parameters, moments, views):
        def part(views):
            def total(parameters):
                model = nnx.merge(graph, parameters, unused)
                return sum(objective(model, views, size, (job.image, job.image), weights, remat=job.remat).values())

            return jax.value_and_grad(total)(parameters)

        loss, gradients = in_parts(part, views, job.parts)
        norm = jax.numpy.ones(())  # nothing is clipped
        return *optim.update(config, config.learning_rate, gradients, norm, moments, parameters), loss

    compiled = jax.jit(step, donate_argnums=(0, 1))
    state = [parameters, optim.init(config, parameters)]

    def advance() -> float:
        *state[:], loss = jax.block_until_ready(compiled(*state, views))
        return float(loss)

    return advance


def torch_step(job: Job) -> Callable[[], float]:
    """Return the step as it is published: the model is called for each of the terms, with the attention in full."""
    import torch
    import torch.nn.functional as F

    import anyup_torch

    model = anyup_torch.from_pretrained(job.weights, backend="dense").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=DECAY)
    guidance, augmented, lr, hr, corners = inputs(job)
    hr = hr.reshape(-1, *hr.shape[2:])
    guidance, augmented, lr, hr = (
        torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() for array in (guidance, augmented, lr, hr)
    )
    regions = [(index // job.crops, *corner) for index, corner in enumerate(corners.reshape(-1, 2).tolist())]
    fine = job.image, job.image

    def difference(prediction, target):
        prediction, target = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (prediction, target))
        least, greatest = target.amin(1, keepdim=True), target.amax(1, keepdim=True)
        scaled = ((x - least) / (greatest - least + 1e-6) for x in (prediction, target))
        same = torch.ones(len(target))
        return F.cosine_embedding_loss(prediction, target, same) + F.mse_loss(*scaled)

    def advance() -> float:
        prediction = model(guidance, lr, (job.size, job.size))
        cut = torch.stack([prediction[i, :, y : y + job.cells, x : x + job.cells] for i, y, x in regions])
        loss = difference(cut, hr)
        other = model(augmented, lr, fine)
        with torch.no_grad():
            target = model(guidance, lr, fine)
        loss = loss + REGULARISATION * difference(other, target)
        back = F.interpolate(prediction, size=(job.cells, job.cells), mode="area")
        loss = loss + REGULARISATION * difference(back, lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return advance


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(run(Job(**json.loads(sys.argv[1]))))))
