"""`--dry-run`: what a run would do, from shapes alone; nothing is fetched and nothing written."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import yaml
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from anyup_core.settings import to_dict
from train import program
from train.config import Config


def show(config: Config, mesh: Mesh, source: Any) -> None:
    """Print the configuration, parameters, shapes, devices and, for each encoder, the memory its step takes."""
    if jax.process_index() != 0:
        return
    out = Console(width=120, highlight=False, markup=False)
    out.print(yaml.safe_dump(to_dict(config), sort_keys=False).rstrip())
    _, state = program.abstract_state(config)
    trained, carried = (_count(tree) for tree in (state.params, state.carried))
    out.print(f"\nparameters  {trained + carried:,}, of which {carried:,} are carried and never trained")
    kinds = {device.device_kind for device in mesh.devices.flat}
    processes = len({device.process_index for device in mesh.devices.flat})
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    out.print(f"devices     {mesh.size} x {', '.join(sorted(kinds))} in {processes} processes, mesh {shape}")
    out.print(f"data        {len(source):,} photographs, {len(source) / config.batch_size:.1f} steps an epoch")
    for name, struct in program.batch_shapes(config).items():
        out.print(
            f"batch       {name} {' x '.join(map(str, struct.shape))} {struct.dtype}, shared by {mesh.size} devices"
        )
    for name, encoder in config.encoders.items():
        memory = program.lower(config, mesh, name).compile().memory_analysis()
        held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        out.print(
            f"memory      {name} ({encoder.name}): {(held + temporary) / 1e6:,.0f} MB a device, {held / 1e6:,.0f} "
            f"of it parameters, moments, encoder and batch, {temporary / 1e6:,.0f} MB while a step runs"
        )


def _count(tree: nnx.State) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
