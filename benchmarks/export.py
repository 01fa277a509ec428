"""The ONNX file in ONNX Runtime beside the model in PyTorch: time, peak memory, error."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks import worker
from benchmarks.encoders import in_process
from benchmarks.tables import table_of

SIZES = ((224, 14, 320), (448, 32, 384))  # side of the image, of the features, and their channels
WEIGHTS = "anyup_efficientnet_lite"


@dataclasses.dataclass(frozen=True)
class Job:
    """A size to run; `alone`: in ONNX Runtime alone, once, for its peak memory.

    Attributes:
        image, cells, channels: sides of the image and of the features, and their channels.
        dtype: of the stored weights.
        path: of the file; it is written where it does not exist.
        repeats: timed turns after the first.
    """

    image: int
    cells: int
    channels: int
    dtype: str
    path: str
    repeats: int
    alone: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job measured.

    Attributes:
        written, megabytes, nodes: seconds it took to write the file, its size, and its nodes.
        torch, onnx: seconds of the turns.
        error, largest: of the output.
        peak: megabytes of the process.
    """

    written: float
    megabytes: float
    nodes: int
    torch: list[float]
    onnx: list[float]
    error: float
    largest: float
    peak: float


def export(rounds: int) -> Table:
    """AnyUp as an ONNX file in ONNX Runtime, beside PyTorch: time, peak memory and error."""
    title = f"the packaged weights, float32 on a CPU; medians of {rounds} turns (lowest - highest)"
    columns = ("MB", "nodes", "written s", "torch s", "ONNX Runtime s", "ratio", "error", "of", "peak MB")
    table = table_of(title, "", *columns)
    for dtype in ("float32", "float16"):
        for image, cells, channels in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                job = Job(image, cells, channels, dtype, str(Path(folder) / "anyup.onnx"), rounds)
                both, alone = (measure(each) for each in (job, dataclasses.replace(job, alone=True)))
            ratios = np.array(both.onnx) / np.array(both.torch)
            spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} - {ratios.max():.2f})"
            seconds = (f"{np.median(each):.2f}" for each in (both.torch, both.onnx))
            facts = f"{both.megabytes:.2f}", str(both.nodes), f"{both.written:.1f}"
            error = f"{both.error:.1e}", f"{both.largest:.1f}"
            name = f"{image}², {cells}² cells, C = {channels}, {dtype}"
            table.add_row(name, *facts, *seconds, spread, *error, f"{alone.peak:.0f}")
    table.caption = "ratio: ONNX Runtime's seconds / PyTorch's; peak: of a process that runs the file once, and no more"
    return table


def measure(job: Job) -> Outcome:
    """Run a job in a new process and return what it measured."""
    return Outcome(**in_process([json.dumps(dataclasses.asdict(job))], module="benchmarks.export"))


def run(job: Job) -> Outcome:
    """Run a job in this process."""
    path, written = Path(job.path), 0.0
    image, features = worker.inputs(worker.Job("jax", image=job.image, cells=job.cells, channels=job.channels))
    image, features = (np.ascontiguousarray(x.transpose(0, 3, 1, 2)) for x in (image, features))
    if not path.exists():
        written = write(path, job.dtype)
    file = onnx_call(path, image, features)
    output = file()
    if job.alone:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        return Outcome(written, path.stat().st_size / 1e6, 0, [], [], 0.0, 0.0, peak)
    model = torch_call(image, features)
    expected = model()
    torch_seconds, onnx_seconds = [], []
    for _ in range(job.repeats):
        torch_seconds.append(worker.timed(model))
        onnx_seconds.append(worker.timed(file))
    error, largest = float(np.abs(output - expected).max()), float(np.abs(expected).max())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return Outcome(written, path.stat().st_size / 1e6, nodes(path), torch_seconds, onnx_seconds, error, largest, peak)


def write(path: Path, dtype: str) -> float:
    """Write the file; return the seconds it took."""
    import anyup_torch

    model = anyup_torch.from_pretrained(WEIGHTS)
    start = time.perf_counter()
    anyup_torch.export_onnx(model, path, dtype=dtype)
    return time.perf_counter() - start


def nodes(path: Path) -> int:
    import onnx

    from anyup_core.export.builder import all_nodes

    return len(list(all_nodes(onnx.load(path).graph.node)))


def onnx_call(path: Path, image: np.ndarray, features: np.ndarray) -> Callable[[], np.ndarray]:
    """Return a call that runs the file; its threads do not spin, as the other framework runs beside it."""
    import onnxruntime

    import anyup_core

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options)
    feeds = anyup_core.onnx_inputs(path, image, features)
    return lambda: session.run(None, feeds)[0]


def torch_call(image: np.ndarray, features: np.ndarray) -> Callable[[], np.ndarray]:
    import torch

    import anyup_torch

    model = anyup_torch.from_pretrained(WEIGHTS, backend="tiled")
    given = torch.from_numpy(image), torch.from_numpy(features)

    @torch.inference_mode()
    def call() -> np.ndarray:
        return model(*given).numpy()

    return call


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(run(Job(**json.loads(sys.argv[1]))))))
