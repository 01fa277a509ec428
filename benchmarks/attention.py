"""What each attention backend does for one query: keys scored, operations, bytes and time, beside the exact minimum."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
from rich.table import Table

from anyup_core.geometry import AxisWindow, axis_window, plan_tiles
from benchmarks.tables import table_of

SIDE, CELLS, CHANNELS = 224, 16, 384  # small enough for `dense`
DIM, HEADS, RATIO = 128, 4, 0.1
ITEM = 4  # bytes of a float32


@dataclasses.dataclass(frozen=True)
class Work:
    """What a backend does for one query, on average.

    Attributes:
        keys: keys it is scored against, seen or not.
        operations: multiplications and additions of scores and averages.
        bytes: queries, keys and values read and the output written once for each tile; scores, upsampled keys and
            per-head outputs as well where they are written to memory.
    """

    keys: float
    operations: float
    bytes: float

    @classmethod
    def of_tiles(cls, queries: int, keys: int, *, scored: int = 1, read: int = 1) -> Work:
        """Tiles of `queries` against slices of `keys`, scores computed `scored` times and keys read `read` times."""
        operations = 2 * keys * (scored * DIM + CHANNELS)
        loaded = keys * (read * DIM + CHANNELS) / queries
        return cls(keys, operations, ITEM * (read * DIM + CHANNELS + loaded))


def minimum(axis: AxisWindow) -> Work:
    """Every query with the distinct keys it sees, every array read or written once."""
    keys = float((axis.count > 0).sum(1).mean()) ** 2
    return Work(keys, 2 * keys * (DIM + CHANNELS), ITEM * (DIM + CHANNELS) * (1 + CELLS**2 / SIDE**2))


def work(backend: str, axis: AxisWindow) -> Work:
    """Count what a backend does; from the tiles that it plans."""
    everything = CELLS**2
    if backend == "dense":  # scores written and read once as such, once as weights of each head, once as their mean
        plain = Work.of_tiles(SIDE**2, everything)
        return dataclasses.replace(plain, bytes=plain.bytes + ITEM * everything * (4 * HEADS + 2))
    if backend == "natten":  # what its CUDA kernels do: a value for each head, keys and values at every query
        keys = axis.neighbourhood.kernel**2
        return Work(keys, 2 * keys * (DIM + HEADS * CHANNELS), ITEM * (2 * (DIM + CHANNELS) + 2 * HEADS * CHANNELS))
    if backend == "pallas_tpu":
        import jax

        from anyup_jax.attention.pallas_tpu import kernel_tables

        shapes = (SIDE, DIM), (CELLS, DIM), (CELLS, CHANNELS)
        arrays = [jax.ShapeDtypeStruct((1, n, n, c), "float32") for n, c in shapes]
        tables = kernel_tables(*arrays, axis, axis, HEADS)
        (_, height, tall), (_, width, wide) = tables.rows.bias.shape, tables.cols.bias.shape
        # the heads share one product of all D lanes each
        return Work.of_tiles(height * width, tall * wide, scored=HEADS)
    if backend == "triton":
        import torch

        from anyup_torch.attention.triton import MAX_QUERIES
        from anyup_torch.attention.triton_kernels import blocks

        tall, wide = plan_tiles(axis, axis, MAX_QUERIES)
        queries = tall.size * wide.size
        widest = blocks(queries, DIM // HEADS, CHANNELS, torch.float32)["BLOCK_E"]
        passes = 1 + math.ceil(CHANNELS / widest)  # the sums, then the weights again for each block of channels
        return Work.of_tiles(queries, tall.span * wide.span, scored=passes, read=passes)
    tall, wide = plan_tiles(axis, axis)
    return Work.of_tiles(tall.size * wide.size, tall.span * wide.span)


def seconds(framework: str, backend: str, axis: AxisWindow, rounds: int) -> float:
    """Median time of a call, compiled in JAX, on the CPU."""
    random = np.random.default_rng(0)
    shapes = (SIDE, DIM), (CELLS, DIM), (CELLS, CHANNELS)
    arrays = [random.standard_normal((1, n, n, c), dtype=np.float32) for n, c in shapes]
    if framework == "jax":
        import jax

        from anyup_jax.attention import window_attention

        compiled = jax.jit(lambda *x: window_attention(*x, axis, axis, num_heads=HEADS, backend=backend))
        arrays = list(map(jax.numpy.asarray, arrays))

        def call() -> None:
            compiled(*arrays).block_until_ready()
    else:
        import torch

        from anyup_torch.attention import window_attention

        tensors = [torch.from_numpy(x) for x in arrays]

        def call() -> None:
            with torch.no_grad():
                window_attention(*tensors, axis, axis, num_heads=HEADS, backend=backend)

    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def attention(rounds: int) -> Table:
    """Operations, bytes and time of one query for each attention backend, beside the exact minimum."""
    from anyup_torch.attention.natten import installed

    title = f"attention of one query, {SIDE} x {SIDE} queries, {CELLS} x {CELLS} cells, C = {CHANNELS}, float32"
    table = table_of(title, "", "window", "keys", "kFLOP", "x minimum", "bytes", "x minimum", "us on this CPU")
    for window in ("paper", "natten"):
        axis = axis_window(SIDE, CELLS, RATIO, window)
        least = minimum(axis)
        add_row(table, "exact minimum", window, least, least, "")
        for framework, backend in (("jax", "dense"), ("jax", "tiled"), ("torch", "dense"), ("torch", "tiled")):
            took = f"{seconds(framework, backend, axis, rounds) / SIDE**2 * 1e6:.2f}"
            add_row(table, f"{framework} {backend}", window, work(backend, axis), least, took)
        add_row(table, "jax pallas_tpu", window, work("pallas_tpu", axis), least, "TPU only")
        try:
            add_row(table, "torch triton", window, work("triton", axis), least, "CUDA only")
        except ImportError:
            table.add_row("torch triton", window, *[""] * 5, "not installed")
        if window == "natten":
            took = f"{seconds('torch', 'natten', axis, 1) / SIDE**2 * 1e6:.2f}" if installed() else "not installed"
            add_row(table, "torch natten", window, work("natten", axis), least, took)
    table.caption = (
        "keys: scored, seen or not; FLOP: scores and averages; bytes: read and written for a tile, counted, not "
        "measured. natten: counted as its CUDA kernels work, timed with its CPU backend, which is a check, not a kernel"
    )
    return table


def add_row(table: Table, name: str, window: str, done: Work, least: Work, took: str) -> None:
    ratios = done.operations / least.operations, done.bytes / least.bytes
    cells = f"{done.keys:.0f}", f"{done.operations / 1e3:.0f}", f"{ratios[0]:.2f}", f"{done.bytes:.0f}"
    table.add_row(name, window, *cells, f"{ratios[1]:.2f}", took)
