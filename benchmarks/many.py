"""Several feature maps of one image in one call, beside separate calls, in both frameworks."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable

import numpy as np
from rich.table import Table

from benchmarks.encoders import in_process
from benchmarks.tables import table_of
from benchmarks.worker import timed


@dataclasses.dataclass(frozen=True)
class Job:
    """Feature maps of one image to upsample to its size: batch 1, float32, random weights and inputs.

    Attributes:
        framework: "jax" or "torch".
        image: side of the image.
        maps: (side, channels) of each feature map.
        repeats: timed turns after the first, which compiles.
    """

    framework: str
    image: int
    maps: tuple[tuple[int, int], ...]
    repeats: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Seconds of separate calls and of one call for all maps, turn by turn, and how far apart the outputs are."""

    separate: list[float]
    together: list[float]
    difference: float


SIZES = dict(image=448, maps=((32, 384), (32, 384), (28, 768)))  # two layers of one encoder, and another encoder


def many(rounds: int) -> Table:
    """Three feature maps of a 448 x 448 image in one call of `upsample_many`, and in separate calls."""
    maps = ", ".join(f"{side}² x {channels}" for side, channels in SIZES["maps"])
    title = f"{maps} to {SIZES['image']}², float32, CPU; medians of {rounds} turns"
    table = table_of(title, "", "separate calls s", "one call s", "ratio", "outputs differ by")
    for framework in ("jax", "torch"):
        job = Job(framework, repeats=rounds, **SIZES)
        outcome = Outcome(**in_process([json.dumps(dataclasses.asdict(job))], module="benchmarks.many"))
        separate, together = np.array(outcome.separate), np.array(outcome.together)
        seconds = (f"{np.median(x):.2f}" for x in (separate, together))
        table.add_row(framework, *seconds, f"{np.median(separate / together):.2f} x", f"{outcome.difference:.1e}")
    table.caption = "wanted: 1.6 x or more"
    return table


def run(job: Job) -> Outcome:
    """Time a job in this process."""
    random = np.random.default_rng(0)
    image = random.standard_normal((1, job.image, job.image, 3), dtype=np.float32)
    maps = [random.standard_normal((1, side, side, channels), dtype=np.float32) for side, channels in job.maps]
    separate, together = (jax_calls if job.framework == "jax" else torch_calls)(image, maps)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(separate(), together()))
    turns = [(timed(separate), timed(together)) for _ in range(job.repeats)]
    return Outcome(*map(list, zip(*turns)), difference)


def jax_calls(image: np.ndarray, maps: list[np.ndarray]) -> tuple[Callable[[], list], Callable[[], list]]:
    import jax
    from flax import nnx

    import anyup_jax

    model = anyup_jax.AnyUp(rngs=nnx.Rngs(0))
    image, *maps = map(jax.numpy.asarray, (image, *maps))
    return (
        lambda: [jax.block_until_ready(anyup_jax.upsample(model, image, features)) for features in maps],
        lambda: jax.block_until_ready(anyup_jax.upsample_many(model, image, maps)),
    )


def torch_calls(image: np.ndarray, maps: list[np.ndarray]) -> tuple[Callable[[], list], Callable[[], list]]:
    import torch

    import anyup_torch

    torch.manual_seed(0)
    model = anyup_torch.AnyUp().eval()
    image, *maps = (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in (image, *maps))

    @torch.inference_mode()
    def separate() -> list:
        return [model(image, features).numpy() for features in maps]

    @torch.inference_mode()
    def together() -> list:
        return [output.numpy() for output in anyup_torch.upsample_many(model, image, maps)]

    return separate, together


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(run(Job(**json.loads(sys.argv[1]))))))
