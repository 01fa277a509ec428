"""The whole model compiled ahead of time for TPU chips, none of which has to be present: XLA's memory figures."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time

import numpy as np
from rich.table import Table

from anyup_jax.attention import BACKENDS
from benchmarks.encoders import TOPOLOGY, TPU_ENVIRONMENT, Program, in_process, need_libtpu
from benchmarks.tables import table_of


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: an `image`^2 image and `cells`^2 x `channels` features in bfloat16, batch 1.

    Attributes:
        image, cells, channels: sizes.
        backend: how attention is computed.
        chips: how many chips share the image's rows.
        gradient: the gradient of the mean square of the output by every parameter, instead of the output.
        generation: of the chips.
    """

    image: int = 448
    cells: int = 32
    channels: int = 384
    backend: str = "auto"
    chips: int = 1
    gradient: bool = False
    generation: str = "v5e"

    def __str__(self) -> str:
        return f"{self.image}², {self.cells}² x {self.channels}" + (", gradient" if self.gradient else "")


SIZES = dict(image=448, cells=32, channels=384), dict(image=2048, cells=128, channels=1024)
CHIPS = 1, 2, 4, 8


def tpu(rounds: int) -> Table:
    """The whole forward pass and its gradient compiled for one TPU v5e chip, bfloat16, with each backend."""
    need_libtpu()
    table = columns("AnyUp compiled for one v5e chip, batch 1, bfloat16", "backend")
    for size in SIZES:
        for backend in BACKENDS:
            fill(table, Case(**size, backend=backend), backend)
    for backend in [name for name in BACKENDS if name != "dense"]:
        fill(table, Case(**SIZES[0], backend=backend, gradient=True), backend)
    table.caption = "GB moved and GFLOP are XLA's count, which takes the body of a loop once; a v5e chip has 16 GB"
    return table


def tpu_rows(rounds: int) -> Table:
    """The whole forward pass with the image's rows spread over the chips of a v5e:2x4 slice, bfloat16."""
    need_libtpu()
    table = columns("AnyUp compiled for a v5e:2x4 slice, batch 1, bfloat16; per chip", "chips")
    for chips in CHIPS:
        fill(table, Case(**SIZES[1], chips=chips), str(chips))
    return table


def columns(title: str, first: str) -> Table:
    return table_of(title, "", first, "temporary MB", "output MB", "arguments MB", "GB moved", "GFLOP", "compile s")


def fill(table: Table, case: Case, name: str) -> None:
    try:
        program = compile_apart(case)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        table.add_row(str(case), name, "does not fit")
        return
    megabytes = (f"{size / 1e6:.0f}" for size in (program.temporary, program.output, program.arguments))
    table.add_row(
        str(case), name, *megabytes, f"{program.accessed / 1e9:.2f}", f"{program.flops / 1e9:.0f}",
        f"{program.seconds:.0f}",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelProgram(Program):
    """A program's figures per chip, the bytes of its output, and how often each collective stands in it."""

    output: int
    collectives: dict[str, int]
    kernels: int


def compile_apart(case: Case) -> ModelProgram:
    """Compile in a new process. Raises RuntimeError with XLA's message if the program does not fit the chip."""
    return ModelProgram(**in_process([json.dumps(dataclasses.asdict(case))], TPU_ENVIRONMENT, "benchmarks.tpu"))


def compile_here(case: Case) -> ModelProgram:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from anyup_jax import AnyUp, AnyUpConfig, sharding
    from anyup_jax.model import compiled

    one = TOPOLOGY | {"topology_name": f"{case.generation}:1x1"}
    slices = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v5p": "v5p:2x2x1"}
    alone = case.chips == 1 and case.generation == "v5e"
    topology = one if alone else dict(platform="tpu", topology_name=slices[case.generation])
    devices = topologies.get_topology_desc(**topology).devices[: case.chips]
    mesh, rows = Mesh(np.array(devices), ("rows",)), P(None, "rows")
    model = lambda: AnyUp(AnyUpConfig(backend=case.backend), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(model))

    def spread(x, spec=P()):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    state, size = jax.tree.map(spread, state), (case.image, case.image)
    image = spread(jax.ShapeDtypeStruct((1, *size, 3), jnp.bfloat16), rows)
    features = spread(jax.ShapeDtypeStruct((1, case.cells, case.cells, case.channels), jnp.bfloat16))
    if case.chips > 1:
        program = functools.partial(sharding.compiled, mesh=mesh, spec=rows)
        lower = functools.partial(
            sharding.compiled.lower, graph, state, image, [(features, None)], size, None, mesh, rows
        )
    else:
        program = compiled
        lower = functools.partial(compiled.lower, graph, state, image, [(features, None)], size, None)
    if case.gradient:

        def loss(parameters, rest, image, features):
            state = nnx.merge_state(parameters, rest)
            (output,) = program(graph, state, image, [(features, None)], output_size=size, q_chunk_size=None)
            return jnp.square(output.astype(jnp.float32)).mean()

        lower = functools.partial(jax.jit(jax.grad(loss)).lower, *state.split(nnx.Param, ...), image, features)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        program = lower().compile()
    seconds = time.perf_counter() - start
    memory, cost, text = program.memory_analysis(), program.cost_analysis(), program.as_text()
    names = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
    collectives = {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in names}
    return ModelProgram(
        memory.temp_size_in_bytes, memory.argument_size_in_bytes, cost["bytes accessed"], cost["flops"], seconds,
        memory.output_size_in_bytes, collectives, text.count("tpu_custom_call"),
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(compile_here(Case(**json.loads(sys.argv[1]))))))
