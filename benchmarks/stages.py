"""Where the time goes: the stages of one forward pass, each timed by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from rich.table import Table

from anyup_core.config import AnyUpConfig
from anyup_core.geometry import axis_window
from benchmarks.tables import table_of
from benchmarks.worker import Job, inputs, timed

STAGES = ("image encoder", "rotation", "key encoder", "unification", "query encoder", "query projection", "attention")


def stages(rounds: int) -> Table:
    """448 x 448, 32 x 32, C = 384: seconds of each stage; fusion across stages makes the whole a little faster."""
    job, title = Job("jax"), f"stages of the forward pass, seconds, medians of {rounds} runs"
    table = table_of(title, "", "jax", "torch", "GFLOP")
    calls = jax_stages(job), torch_stages(job)
    for name in STAGES:
        seconds = []
        for framework in calls:
            timed(framework[name])
            seconds.append(np.median([timed(framework[name]) for _ in range(rounds)]))
        table.add_row(name, *(f"{value:.3f}" for value in seconds), f"{gflop(name, job):.1f}")
    return table


def gflop(stage: str, job: Job, dim: int = 128, filters: int = 128, taps: int = 25) -> float:
    """Multiplications and additions of a stage's matrix products, in 10^9; attention: the windows' exact minimum."""
    pixels, cells, layer = job.image**2, job.cells**2, 2 * dim**2 / 1e9
    seen = axis_window(job.image, job.cells, AnyUpConfig().window_ratio)
    keys = seen.dense().sum(1).mean() ** 2  # a query's mean
    return {
        "image encoder": pixels * (4 * layer + 2 * 3 * dim / 1e9),
        "rotation": 0.0,
        "key encoder": pixels * 4 * layer + cells * layer,
        "unification": 2 * cells * job.channels * filters * taps / 1e9,
        "query encoder": pixels * 5 * layer,
        "query projection": pixels * 10 * layer,
        "attention": 2 * pixels * keys * (dim + job.channels) / 1e9,
    }[stage]


def jax_stages(job: Job) -> dict[str, Callable[[], object]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from anyup_jax import AnyUp
    from anyup_jax.attention import window_attention
    from anyup_jax.pooling import adaptive_average_pool

    model = AnyUp(rngs=nnx.Rngs(0))
    image, features = map(jnp.asarray, inputs(job))
    pixels = jnp.asarray(np.random.default_rng(1).standard_normal((1, job.image, job.image, 128), dtype=np.float32))
    keys = pixels[:, : job.cells, : job.cells]
    window = axis_window(job.image, job.cells, 0.1)
    decode, size = model.cross_decode, (job.cells, job.cells)

    def call(function: Callable, *arrays: jax.Array) -> Callable[[], object]:
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(*arrays))

    return {
        "image encoder": call(model.image_encoder, image),
        "rotation": call(model.rope, pixels),
        "key encoder": call(lambda x: model.key_encoder(x, lambda x: adaptive_average_pool(x, size)), pixels),
        "unification": call(model.key_features_encoder, features),
        "query encoder": call(model.query_encoder, pixels),
        "query projection": call(decode.project_query, pixels),
        "attention": call(
            lambda q, k, v: window_attention(q, k, v, window, window, num_heads=4), pixels, keys, features
        ),
    }


def torch_stages(job: Job) -> dict[str, Callable[[], object]]:
    import torch
    import torch.nn.functional as F

    from anyup_torch import AnyUp, streaming, threads
    from anyup_torch.attention import window_attention

    model = AnyUp().eval()
    features = torch.from_numpy(inputs(job)[1]).permute(0, 3, 1, 2).contiguous()
    shape, cells, dim = (job.image, job.image), (job.cells, job.cells), 128
    guide, hidden = torch.randn(2, job.image**2, dim)
    stream, decode, window = streaming.Stream(hidden), model.cross_decode, axis_window(job.image, job.cells, 0.1)

    def encoder(blocks: torch.nn.Sequential, pool: bool = False) -> Callable[[], object]:
        def run() -> None:
            x = streaming.Pixels.around(guide.normal_())
            for index in range(len(x.sums)):
                x.count(index, torch.empty_like(x.block(index)))
            x = stream.apply(blocks[1], x)
            _ = stream.pool(blocks[2], x, shape, [cells]) if pool else stream.apply(blocks[2], x)

        return run

    queries = guide.reshape(1, *shape, dim)
    keys, values = queries[:, : job.cells, : job.cells], features.permute(0, 2, 3, 1)
    calls = {
        "image encoder": encoder(model.image_encoder),
        "rotation": lambda: streaming.rotate_and_project(guide, shape, model.rope, (model.key_encoder[0],), (hidden,)),
        "key encoder": encoder(model.key_encoder, pool=True),
        "unification": lambda: model.key_features_encoder(features),
        "query encoder": encoder(model.query_encoder),
        "query projection": lambda: decode.cross_attn.project_query(
            F.conv2d(queries.permute(0, 3, 1, 2), decode.conv2d.weight, padding=1).permute(0, 2, 3, 1)
        ),
        "attention": lambda: window_attention(queries, keys, values, window, window, num_heads=4),
    }

    @threads.on_own_threads
    @torch.no_grad()
    def as_the_model(_: torch.nn.Module, function: Callable[[], object]) -> None:
        function()

    def no_grad(function: Callable[[], object]) -> Callable[[], object]:
        return lambda: as_the_model(model, function)

    return {name: no_grad(function) for name, function in calls.items()}
