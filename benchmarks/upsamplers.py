"""JAFAR, FeatUp, LoftUp and NAF beside a plain transcription of their published formulas; their memory."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from collections.abc import Callable

import numpy as np
from rich.table import Table

from anyup_core.upsamplers.featup import KEY_DIM, SCALE, STAGES, TAPS
from anyup_core.upsamplers.jafar import JAFARConfig
from anyup_core.upsamplers.loftup import IMAGE_CODE, LAYERS, LoftUpConfig
from anyup_core.upsamplers.naf import NAFConfig
from benchmarks.encoders import in_process
from benchmarks.tables import table_of
from benchmarks.worker import timed

FRAMEWORKS = ("torch",)
SIDES = {112: 12, 224: 16, 448: 32}  # pixels of image and output -> cells; NAF takes no fewer than 9
CHANNELS = 384
PLAIN_LIMIT = {"jafar": 448, "featup": 448, "loftup": 224, "naf": 224}  # beyond it takes minutes a run


@dataclasses.dataclass(frozen=True)
class Job:
    """An upsampler to time: batch 1, float32, random weights and inputs, square sizes.

    Attributes:
        framework: "torch".
        method: name of the upsampler.
        image, cells, channels: sides of the image and of the feature map, and its channels.
        repeats: turns of ours and of the plain one, after a first run of each.
        plain: whether the plain one is timed.
    """

    framework: str
    method: str
    image: int
    cells: int
    channels: int = CHANNELS
    repeats: int = 3
    plain: bool = True


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Seconds of ours, and of the plain one at its best chunk, turn by turn; and how far apart the outputs are.

    Attributes:
        peak: megabytes of the process that had run ours twice.
        chunk: the best one; None without the plain one, which has no times then either.
    """

    ours: list[float]
    plain: list[float]
    peak: float
    chunk: int | None
    difference: float


def upsamplers(rounds: int) -> Table:
    """JAFAR, FeatUp, LoftUp and NAF to the size of images of 112, 224 and 448 pixels, beside the plain formulas."""
    title = f"C = {CHANNELS}, float32, CPU; medians of {rounds} turns"
    table = table_of(title, "", "ms", "plain / this", "best chunk", "GFLOP", "GFLOP/s", "peak MB", "outputs differ by")
    for method, limit in PLAIN_LIMIT.items():
        for side, cells in SIDES.items():
            work = gflop(method, side, cells, CHANNELS)
            for framework in FRAMEWORKS:
                job = Job(framework, method, side, cells, repeats=rounds, plain=side <= limit)
                outcome = Outcome(**in_process([json.dumps(dataclasses.asdict(job))], module="benchmarks.upsamplers"))
                seconds = float(np.median(outcome.ours))
                ratio = ("not run", "", "")
                if outcome.plain:
                    speedup = np.median(np.divide(outcome.plain, outcome.ours))
                    ratio = (f"{speedup:.2f} x", str(outcome.chunk), f"{outcome.difference:.0e}")
                figures = (f"{work:.0f}", f"{work / seconds:.0f}", f"{outcome.peak:.0f}", ratio[2])
                name = f"{framework} {method}, {side} px, {cells} x {cells} cells"
                table.add_row(name, f"{1e3 * seconds:.0f}", *ratio[:2], *figures)
    table.caption = (
        "plain: benchmarks.plain_upsamplers, eager PyTorch; GFLOP: products and sums of the formulas, without "
        f"norms and activations; FeatUp's output is {SCALE} x {SCALE} a cell. The peak holds the framework."
    )
    return table


def gflop(method: str, side: int, cells: int, channels: int) -> float:
    """Return the arithmetic of the products in a method's formulas, in units of 10^9 operations."""
    pixels, keys = side**2, cells**2
    if method == "jafar":
        dim = JAFARConfig(channels=channels).qk_dim
        encoders, modulation = pixels * (3 * dim + 14 * dim**2), keys * (channels * dim + 7 * dim**2)
        decode = pixels * (10 * dim**2 + keys * (dim + channels))
        return 2e-9 * (encoders + modulation + decode)
    if method == "featup":
        codes = 3 * KEY_DIM + KEY_DIM**2 + TAPS * KEY_DIM + (TAPS + 3) * TAPS + TAPS**2
        stages = sum(4**stage * keys for stage in range(1, STAGES + 1)) * (codes + TAPS * channels)
        return 2e-9 * (stages + SCALE**2 * keys * channels**2)
    if method == "loftup":
        dim = LoftUpConfig(channels=channels).dim
        convolutions, attention = 9 * (IMAGE_CODE * dim + dim**2), 2 * dim**2 + 2 * keys * dim
        layers = LAYERS * (pixels * (attention + 2 * dim * channels) + keys * 2 * dim**2)
        return 2e-9 * (pixels * (convolutions + dim * channels) + layers)
    config = NAFConfig()
    half = config.dim // 2
    encoders = 3 * half * (1 + 9) + 4 * half**2 * (1 + 9)
    return 2e-9 * pixels * (encoders + config.kernel_size**2 * (config.dim + channels))


def run(job: Job) -> Outcome:
    """Time a job in this process."""
    ours, plain, chunks = torch_calls(job)
    expected = ours()
    seconds = [timed(ours)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if not job.plain:
        seconds += [timed(ours) for _ in range(job.repeats - 1)]
        return Outcome(seconds, [], peak, None, 0.0)
    best = min(chunks, key=lambda chunk: timed(lambda: plain(chunk)))
    difference = float(np.abs(plain(best) - expected).max())
    turns = [(timed(ours), timed(lambda: plain(best))) for _ in range(job.repeats)]
    return Outcome(*map(list, zip(*turns)), peak, best, difference)


def torch_calls(job: Job) -> tuple[Callable[[], np.ndarray], Callable[[int], np.ndarray], tuple[int, ...]]:
    import torch

    from anyup_torch.upsamplers.pretrained import model_class
    from benchmarks.plain_upsamplers import CHUNKS, PLAIN

    torch.manual_seed(0)
    model = model_class(job.method)(**{} if job.method == "naf" else dict(channels=job.channels)).eval()
    image, features = torch.randn(1, 3, job.image, job.image), torch.randn(1, job.channels, job.cells, job.cells)
    size = model.native_size(image, features)

    @torch.inference_mode()
    def ours() -> np.ndarray:
        return model(image, features).numpy()

    @torch.inference_mode()
    def plain(chunk: int) -> np.ndarray:
        return PLAIN[job.method](model, image, features, size, chunk).numpy()

    return ours, plain, CHUNKS[job.method]


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(run(Job(**json.loads(sys.argv[1]))))))
