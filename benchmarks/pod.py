"""The whole training step compiled ahead of time for TPU pods, none of which has to be present: memory and traffic."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from typing import Any

from rich.table import Table

from benchmarks.encoders import TPU_ENVIRONMENT, in_process, need_libtpu
from benchmarks.tables import table_of

REPLICATED: dict[str, Any] = {}
FSDP = dict(model=4, parameters="fsdp", encoders="fsdp")
CHIPS = {"v5e:4x4": 16, "v5e:16x16": 256, "v5p:4x4x4": 64}
BATCHES = 64, 256, 1024
GIGABYTES = {"v5e": 16, "v5p": 95}  # of a chip's memory
MOST = {"v5e": 16, "v5p": 64}  # photographs of a chip at once; more are worked on in parts
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")  # type, its bits, shape


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: a topology of chips, and the settings of a run as `train.config` has them."""

    topology: str
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """What XLA says of a step, per chip.

    Attributes:
        arguments, temporary: bytes of state, encoder and batch; and bytes used while the step runs.
        collectives: how often each kind stands in the program; those that do not are left out.
        exchanged: bytes of what they give to each chip.
        gradients: bytes of the gradients of all trained parameters.
        seconds: that compiling took.
    """

    arguments: int
    temporary: int
    collectives: dict[str, int]
    exchanged: int
    gradients: int
    seconds: float


def pod(rounds: int) -> Table:
    """The whole training step (DINOv2-S, paper preset, bfloat16) compiled for v5e and v5p pods; minutes a row."""
    need_libtpu()
    title = "a training step of the paper preset compiled ahead of time, bfloat16; per chip"
    columns = (
        "batch",
        "in parts",
        "arguments MB",
        "temporary MB",
        "collectives",
        "exchanged MB",
        "gradients MB",
        "compile s",
    )
    table = table_of(title, "chips", *columns)
    for case in cases():
        mesh, parts = case.settings["mesh"], case.settings["optimizer"]["accumulate"]
        first = (
            f"{case.topology}, FSDP over {mesh['model']}" if mesh else case.topology,
            str(case.settings["batch_size"]),
        )
        try:
            step = compile_apart(case)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            table.add_row(*first, str(parts), "does not fit")
            continue
        listed = ", ".join(f"{count} {name}" for name, count in step.collectives.items()) or "none"
        megabytes = (f"{size / 1e6:.0f}" for size in (step.arguments, step.temporary))
        travels = (f"{size / 1e6:.2f}" for size in (step.exchanged, step.gradients))
        table.add_row(*first, str(parts), *megabytes, listed, *travels, f"{step.seconds:.0f}")
    sizes = ", a ".join(f"{name} chip has {size} GB" for name, size in GIGABYTES.items())
    table.caption = (
        f"a {sizes}. Parameters are replicated unless FSDP is named. Exchanged: results of the collectives, one in a "
        "loop counted once; with replicated parameters that is the gradients, less those of weights that never reach "
        "the output, and the metrics."
    )
    return table


def cases() -> list[Case]:
    """Every topology with every batch that gives each chip a photograph; and one with FSDP."""
    chosen = []
    for topology, chips in CHIPS.items():
        fitting = [batch for batch in BATCHES if batch >= chips]
        chosen += [case_of(topology, batch, REPLICATED) for batch in fitting]
    return [*chosen, case_of("v5e:16x16", max(BATCHES), FSDP)]


def case_of(topology: str, batch: int, mesh: dict[str, Any]) -> Case:
    """Return the paper preset on a topology, in as few parts as should fit a chip."""
    from train import presets

    groups, changes = presets.EXPERIMENTS["paper"]
    parts = math.ceil(batch / CHIPS[topology] / MOST[topology.partition(":")[0]])
    settings = dict(
        encoders=presets.ENCODERS[groups["encoders"]], dataset=presets.DATASETS[groups["dataset"]], mesh=mesh,
        optimizer=dict(accumulate=parts), batch_size=batch,
    )  # fmt: skip
    return Case(topology, changes | settings)


def compile_apart(case: Case) -> Step:
    """Compile in a new process. Raises RuntimeError with XLA's message if the program does not fit the chip."""
    return Step(**in_process([json.dumps(dataclasses.asdict(case))], TPU_ENVIRONMENT, "benchmarks.pod"))


def compile_here(case: Case) -> Step:
    import jax
    from jax.experimental import topologies

    from anyup_core.settings import from_dict
    from train import program, sharding
    from train.config import Config

    config = from_dict(Config, case.settings)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    mesh = sharding.make_mesh(config.mesh, list(devices))
    sharding.check_batch(config.batch_size, config.optimizer.accumulate, mesh)
    start = time.perf_counter()
    compiled = program.lower(config, mesh, next(iter(config.encoders))).compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    counts = {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in COLLECTIVES}
    collectives = {name: count for name, count in counts.items() if count}
    gradients = sum(4 * x.size for x in jax.tree.leaves(program.abstract_state(config)[1].params))
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Step(*sizes, collectives, exchanged(text), gradients, seconds)


def exchanged(text: str) -> int:
    """Return the bytes of the results of all collectives in a compiled program, each counted once."""
    results = re.findall(rf"= (.*?) (?:{'|'.join(COLLECTIVES)})(?:-done)?\(", text)
    return sum(size_of(*array) for result in results for array in ARRAY.findall(result))


def size_of(kind: str, bits: str, shape: str) -> int:
    """Return the bytes of an array as a program's text gives it, such as bf16[8,128]."""
    return math.prod(map(int, filter(None, shape.split(",")))) * (1 if kind == "pred" else int(bits)) // 8


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(compile_here(Case(**json.loads(sys.argv[1]))))))
