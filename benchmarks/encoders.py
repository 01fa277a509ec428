"""Flax encoders against timm on this machine, and compiled for a TPU chip, which does not have to be present."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time

import numpy as np
from rich.table import Table

from benchmarks.tables import table_of

BATCH, SIDE = 4, 224
ENCODERS = (
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_large_patch16_224",
    "vit_small_patch16_dinov3",
    "resnet50",
    "convnext_tiny",
    "tf_efficientnet_lite0",
)
FOR_TPU = ("vit_small_patch14_dinov2", "vit_base_patch16_clip_224")
TPU_SIDES = (224, 448)
TOPOLOGY = dict(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
TPU_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds for a batch, one number a run: runs of both frameworks take turns; and of Flax's first run."""

    timm: list[float]
    flax: list[float]
    first: float


@dataclasses.dataclass(frozen=True)
class Program:
    """What XLA says of a program for one chip, in bytes and operations; and the seconds that compiling it took."""

    temporary: int
    arguments: int
    accessed: float
    flops: float
    seconds: float


def encoders(rounds: int) -> Table:
    """Images a second of each Flax encoder and of timm's, batch 4, 224 x 224, float32, and seconds of the first run."""
    title = f"encoders, batch {BATCH}, {SIDE} x {SIDE} px, float32, CPU; medians of {rounds} turns"
    table = table_of(title, "", "timm images/s", "Flax images/s", "Flax / timm", "first run s")
    for name in ENCODERS:
        speed = Speed(**in_process(["speed", name, str(rounds)]))
        timm, flax = np.array(speed.timm), np.array(speed.flax)
        each = (f"{BATCH / np.median(seconds):.1f}" for seconds in (timm, flax))
        table.add_row(name, *each, f"{np.median(timm / flax):.2f}", f"{speed.first:.1f}")
    return table


def encoders_tpu(rounds: int) -> Table:
    """The encoders of the training recipe compiled ahead of time for one TPU v5e chip, batch 4, bfloat16."""
    need_libtpu()
    table = table_of(
        f"encoders compiled for one v5e chip, batch {BATCH}, bfloat16", "", "temporary MB", "arguments MB", "GB moved",
        "GFLOP", "compile s",
    )  # fmt: skip
    for name in FOR_TPU:
        for side in TPU_SIDES:
            program = Program(**in_process(["compile", name, str(side)], TPU_ENVIRONMENT))
            megabytes = (f"{size / 1e6:.0f}" for size in (program.temporary, program.arguments))
            work = (f"{program.accessed / 1e9:.2f}", f"{program.flops / 1e9:.0f}")
            table.add_row(f"{name}, {side} px", *megabytes, *work, f"{program.seconds:.1f}")
    table.caption = "GB moved and GFLOP are XLA's count for the same program with its blocks unrolled"
    return table


def need_libtpu() -> None:
    """Raise ImportError if the compiler for TPU chips is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError('Compiling for a TPU needs libtpu, which is not installed: pip install "anyup-jax[tpu]".')


def in_process(
    arguments: list[str], environment: dict[str, str] | None = None, module: str = "benchmarks.encoders"
) -> dict:
    """Run a module in a new process and return what it prints. Raises RuntimeError if it did not end well."""
    command = [sys.executable, "-m", module, *arguments]
    options = dict(capture_output=True, text=True, check=False, env=os.environ | (environment or {}))
    process = subprocess.run(command, **options)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}: {process.stderr.strip()[-500:]}")
    return json.loads(process.stdout.splitlines()[-1])


def speed(name: str, rounds: int) -> Speed:
    """Time timm and Flax in turns, with the same weights."""
    import jax
    import torch

    from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
    from anyup_jax.encoders import creation
    from anyup_torch import encoders

    theirs = encoders.create(name, pretrained=False)
    weights = {key: value.numpy() for key, value in theirs.model.state_dict().items()}
    ours = creation.build(EncoderCheckpoint(name, weights))
    image = np.random.default_rng(0).standard_normal((BATCH, SIDE, SIDE, 3), dtype=np.float32)
    pixels, array = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(), jax.numpy.asarray(image)
    calls = (lambda: theirs(pixels)), (lambda: jax.block_until_ready(ours(array)))
    first = [timed(call) for call in calls][1]
    turns = [[timed(call) for call in calls] for _ in range(max(rounds, 1) * 3)]
    return Speed(*map(list, zip(*turns)), first)


def program(name: str, side: int) -> Program:
    """Compile an encoder for the chip: as it is for the memory, with its blocks unrolled for the counts."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from anyup_core.encoders import catalogue
    from anyup_jax.encoders import creation, layers
    from anyup_jax.encoders.encoder import Encoder

    mesh = Mesh(np.array(topologies.get_topology_desc(**TOPOLOGY).devices), ("chip",))
    sharding = NamedSharding(mesh, PartitionSpec())
    published = catalogue.find(name)
    build = lambda: Encoder(  # noqa: E731
        creation.backbone(published.config, jnp.bfloat16, False, 0), published, dtype=jnp.bfloat16
    )
    graph, state = nnx.split(nnx.eval_shape(build))
    state, image = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (state, jax.ShapeDtypeStruct((BATCH, side, side, 3), jnp.bfloat16)),
    )

    def compiled(unroll: bool) -> jax.stages.Compiled:
        layers.UNROLL = unroll
        with jax.set_mesh(mesh):
            return jax.jit(lambda state, image: nnx.merge(graph, state)(image)).lower(state, image).compile()

    start = time.perf_counter()
    memory = compiled(False).memory_analysis()
    seconds = time.perf_counter() - start
    jax.clear_caches()
    cost = compiled(True).cost_analysis()
    sizes = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    return Program(*sizes, cost["bytes accessed"], cost["flops"], seconds)


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    task, name, number = sys.argv[1:]
    print(json.dumps(dataclasses.asdict((speed if task == "speed" else program)(name, int(number)))))
