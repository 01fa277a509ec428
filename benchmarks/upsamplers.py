"""All upsamplers: ours against plain PyTorch, and time, arithmetic and memory of each by resolution."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from anyup_core.upsamplers import catalogue, featup, loftup, naf
from benchmarks import stages, worker
from benchmarks.encoders import in_process
from benchmarks.tables import table_of

SIZES = dict(image=448, cells=32, channels=384)
SIDES = ((112, 8), (224, 16), (448, 32))  # of the image and of the features: 14 pixels a cell
TRAINED = ("jafar", "featup", "loftup", "naf")
LIMIT = 1e-2  # outputs that differ by more, as a share of the largest, are not the same
DIM = 128  # of JAFAR's queries
PEAK = "peak MB"


@dataclasses.dataclass(frozen=True)
class Duel:
    """A method to time against the plain formulas: batch 1, float32, random weights, the same for all."""

    method: str
    image: int
    cells: int
    channels: int
    repeats: int


@dataclasses.dataclass(frozen=True)
class Turns:
    """What a duel measured; each turn is a pair of wall seconds and CPU seconds.

    Attributes:
        chunk: of the plain formulas, at which they are fastest.
        plain, torch, jax: their turns.
        first: seconds of JAX's first call, which compiles.
        differs: by how much of the largest output the outputs of torch and jax are off.
    """

    chunk: int
    plain: list[tuple[float, float]]
    torch: list[tuple[float, float]]
    jax: list[tuple[float, float]]
    first: float
    differs: list[float]


@dataclasses.dataclass(frozen=True)
class Job:
    """A method to run in one framework, size by size, `repeats` times each after the first."""

    framework: str
    method: str
    sides: tuple[tuple[int, int], ...]
    channels: int
    repeats: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """For each size seconds, the median of the runs, and peak megabytes so far; and the number of parameters."""

    seconds: list[float]
    peaks: list[float]
    parameters: int


def upsamplers(rounds: int) -> Table:
    """JAFAR, FeatUp, LoftUp and NAF: the published formulas in plain PyTorch against ours in both frameworks."""
    image, cells, channels = SIZES["image"], SIZES["cells"], SIZES["channels"]
    title = f"{image}², {cells}² cells, C = {channels}, float32, CPU; medians of {rounds} turns (lowest - highest)"
    columns = (
        "plain s",
        "torch s",
        "jax s",
        "plain / torch",
        "plain / jax",
        "by CPU s",
        "jax first s",
        "outputs differ by",
    )
    table = table_of(title, "", *columns)
    for method in TRAINED:
        turns = measure(Duel(method, repeats=rounds, **SIZES))
        walls, spent = ([np.array(x)[:, i] for x in (turns.plain, turns.torch, turns.jax)] for i in (0, 1))
        seconds = (f"{np.median(each):.2f}" for each in walls)
        ratios = (spread(walls[0] / each) for each in walls[1:])
        by_cpu = ", ".join(f"{np.median(spent[0] / each):.2f}" for each in spent[1:])
        differs = ", ".join(f"{x:.0e}" for x in turns.differs)
        table.add_row(f"{method}, chunk {turns.chunk}", *seconds, *ratios, by_cpu, f"{turns.first:.1f}", differs)
    table.caption = (
        "plain: the published formulas, eager, at the fastest of three chunks; by CPU s: the same two ratios in CPU "
        "seconds; the last column: torch and jax against plain, as a share of the largest output"
    )
    return table


def spread(ratios: np.ndarray) -> str:
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} - {ratios.max():.2f})"


def upsampler_sizes(rounds: int) -> Table:
    """Every upsampler at 112, 224 and 448 pixels: parameters, GFLOP, ms and peak memory in both frameworks."""
    title = f"to the image's size, C = {SIZES['channels']}, float32, CPU; medians of {rounds} runs"
    each = [f"{side}² {what}" for side, _ in SIDES for what in ("GFLOP", "torch ms", "jax ms")]
    table = table_of(title, "", "parameters", *each, f"torch {PEAK}", f"jax {PEAK}")
    for method in catalogue.NAMES:
        torch, jax = (measure(Job(name, method, SIDES, SIZES["channels"], rounds)) for name in ("torch", "jax"))
        cells = [f"{torch.parameters:,}"]
        for index, (image, grid) in enumerate(SIDES):
            cells.append(f"{gflop(method, image, grid, SIZES['channels']):.1f}")
            cells += [f"{1e3 * outcome.seconds[index]:.0f}" for outcome in (torch, jax)]
        table.add_row(method, *cells, *(f"{outcome.peaks[-1]:.0f}" for outcome in (torch, jax)))
    grids = ", ".join(f"{side}²: {cells}²" for side, cells in SIDES)
    table.caption = (
        f"cells: {grids}; {PEAK}: of a process that runs all sizes, with framework and compiler; GFLOP: counted from "
        "the published formulas, products of matrices, convolutions and weighted averages"
    )
    if any(settings(cells) for _, cells in SIDES):
        table.caption += f"; naf: a kernel of {NARROW} where its own, {naf.NAFConfig().kernel_size}, does not fit"
    return table


NARROW = 7  # kernel of NAF for maps too small for its own


def settings(cells: int) -> dict[str, int]:
    """Return what NAF needs for feature maps of this side."""
    return {} if cells >= naf.NAFConfig().kernel_size else dict(kernel_size=NARROW)


def gflop(method: str, image: int, cells: int, channels: int) -> float:
    """Return 10^9 multiplications and additions of the published formulas, image and output of the same size.

    Counted are products of matrices, convolutions, and averages by weights; what a formula throws away is not.
    """
    pixels, keys, layer = image**2, cells**2, 2 * DIM**2
    if method == "anyup":
        job = worker.Job("jax", image=image, cells=cells, channels=channels)
        return sum(stages.gflop(stage, job) for stage in stages.STAGES)
    if method == "jafar":
        encoders = pixels * (2 * 3 * DIM + 14 * layer) + keys * (2 * channels * DIM + 4 * layer)
        projections = pixels * 10 * layer + keys * 3 * layer
        return (encoders + projections + 2 * pixels * keys * (DIM + channels)) / 1e9
    if method == "featup":
        taps, key = featup.TAPS, featup.KEY_DIM
        filters = 3 * key + key**2 + taps * key + (2 * taps + 3) * taps
        upsampled = sum(keys * 4**stage for stage in range(1, featup.STAGES + 1))
        last = keys * featup.SCALE**2
        resized = 4 * channels * pixels if image != cells * featup.SCALE else 0
        return 2 * (upsampled * (filters + (taps + 16) * channels) + last * channels**2 + resized) / 1e9
    if method == "loftup":
        dim = channels + loftup.CELL_CODE
        convolutions = 9 * (loftup.IMAGE_CODE * dim + dim**2)
        block = pixels * 2 * (dim**2 + keys * dim + dim * channels) + keys * 2 * dim**2
        return 2 * (pixels * (convolutions + dim * channels) + loftup.LAYERS * block) / 1e9
    if method == "naf":
        config = naf.NAFConfig(**settings(cells))
        half, taps = config.dim // 2, config.kernel_size**2
        return 2 * pixels * (10 * (3 * half + 4 * half**2) + taps * (config.dim + channels)) / 1e9
    averaged = {"bilinear": 4, "bicubic": 16, "nearest": 0, "joint_bilateral": 25}[method]
    return 2 * pixels * averaged * channels / 1e9


def measure(job: Duel | Job) -> Any:
    """Run a duel or a job in a new process and return what it measured."""
    found = in_process([type(job).__name__, json.dumps(dataclasses.asdict(job))], module="benchmarks.upsamplers")
    return (Turns if isinstance(job, Duel) else Outcome)(**found)


def run(job: Duel | Job) -> Turns | Outcome:
    """Run a duel or a job in this process."""
    return duel(job) if isinstance(job, Duel) else solo(job)


def duel(job: Duel) -> Turns:
    import torch

    from anyup_jax.upsamplers import pretrained
    from anyup_torch.upsamplers import checkpoint
    from benchmarks.plain_upsamplers import CHUNKS, PLAIN

    model, size = torch_model(job.method, job.cells, job.channels), (job.image, job.image)
    image, features = inputs(job.image, job.cells, job.channels)
    given = [torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() for array in (image, features)]

    @torch.inference_mode()
    def plain(chunk: int) -> torch.Tensor:
        return PLAIN[job.method](model, *given, size, chunk)

    ours = torch_call(model, image, features)
    jax = jax_call(pretrained.build(checkpoint(model)), image, features)
    first = worker.timed(jax)
    outputs, tried, differs = [ours(), jax()], {}, []
    outputs = [outputs[0].permute(0, 2, 3, 1).numpy(), np.asarray(outputs[1])]
    for chunk in CHUNKS[job.method]:
        begin = time.perf_counter()
        expected = plain(chunk)
        tried[chunk] = time.perf_counter() - begin
        expected = expected.permute(0, 2, 3, 1).numpy()
        differs = [float(np.abs(output - expected).max() / np.abs(expected).max()) for output in outputs]
        if not max(differs) <= LIMIT:
            raise RuntimeError(f"outputs of {job.method} differ by {differs} of the largest: they are not the same.")
    del expected, outputs
    chunk = min(tried, key=lambda chunk: tried[chunk])
    turns = [[clocked(call) for call in (lambda: plain(chunk), ours, jax)] for _ in range(job.repeats)]
    plain_turns, torch_turns, jax_turns = (list(each) for each in zip(*turns))
    return Turns(chunk, plain_turns, torch_turns, jax_turns, first, differs)


def clocked(call: Callable[[], object]) -> tuple[float, float]:
    """Return wall seconds and CPU seconds of a call."""
    spent = time.process_time()
    return worker.timed(call), time.process_time() - spent


def solo(job: Job) -> Outcome:
    seconds, peaks = [], []
    for image, cells in job.sides:
        call, parameters = prepare(job, image, cells)
        call()
        seconds.append(float(np.median([worker.timed(call) for _ in range(job.repeats)])))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    return Outcome(seconds, peaks, parameters)


def prepare(job: Job, side: int, cells: int) -> tuple[Callable[[], object], int]:
    """Return a call that upsamples, and the number of parameters."""
    image, features = inputs(side, cells, job.channels)
    if job.framework == "jax":
        import jax
        from flax import nnx

        model = jax_model(job.method, cells, job.channels)
        parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
        return jax_call(model, image, features), parameters
    model = torch_model(job.method, cells, job.channels)
    return torch_call(model, image, features), sum(x.numel() for x in model.parameters())


def fields(method: str, cells: int, channels: int) -> dict[str, int]:
    """Return the settings of a model for these features."""
    if method == "naf":
        return settings(cells)
    return dict(channels=channels) if method in TRAINED else {}


def inputs(image: int, cells: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    return worker.inputs(worker.Job("jax", image=image, cells=cells, channels=channels))


def torch_model(method: str, cells: int, channels: int) -> Any:
    """Return a model with random weights, none of which is zero."""
    import torch

    import anyup_torch
    from anyup_torch import upsamplers

    torch.manual_seed(0)
    if method == catalogue.ANYUP:
        return anyup_torch.AnyUp().eval()
    if method not in TRAINED:
        return upsamplers.from_pretrained(method)
    model = upsamplers.pretrained.model_class(method)(**fields(method, cells, channels)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def torch_call(model: Any, image: np.ndarray, features: np.ndarray) -> Callable[[], Any]:
    import torch

    given = [torch.from_numpy(array).permute(0, 3, 1, 2).contiguous() for array in (image, features)]

    @torch.inference_mode()
    def call() -> torch.Tensor:
        return model(*given, image.shape[1:3])

    return call


def jax_model(method: str, cells: int, channels: int) -> Any:
    from flax import nnx

    import anyup_jax
    from anyup_jax.upsamplers import from_pretrained, pretrained

    if method == catalogue.ANYUP:
        return anyup_jax.AnyUp(rngs=nnx.Rngs(0))
    if method not in TRAINED:
        return from_pretrained(method)
    return pretrained.model_class(method)(rngs=nnx.Rngs(0), **fields(method, cells, channels))


def jax_call(model: Any, image: np.ndarray, features: np.ndarray) -> Callable[[], Any]:
    """Return a call of the model, compiled at the first."""
    import jax

    from anyup_jax.upsamplers import upsample

    given = jax.device_put((image, features))
    return lambda: upsample(model, *given, image.shape[1:3]).block_until_ready()


if __name__ == "__main__":
    kind = {"Duel": Duel, "Job": Job}[sys.argv[1]]
    print(json.dumps(dataclasses.asdict(run(kind(**json.loads(sys.argv[2]))))))
