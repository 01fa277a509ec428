"""`--dry-run`: what a run would do, from shapes alone. Nothing is fetched or written."""

from __future__ import annotations

import jax
import yaml
from jax.sharding import Mesh
from rich.console import Console

from anyup_core.settings import to_dict
from train import program
from train.config import Config
from train.data.sources import Source


def show(config: Config, mesh: Mesh, source: Source) -> None:
    """Print the configuration, parameters, shapes, devices and, the memory that a step takes with each encoder."""
    if jax.process_index() != 0:
        return
    out = Console(width=120, highlight=False, markup=False)
    out.print(yaml.safe_dump(to_dict(config), sort_keys=False).rstrip())
    _, state = program.abstract_state(config)
    trained, unused = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, state.unused))
    out.print(f"\nparameters  {trained + unused:,}, of which {unused:,} are never used or trained")
    kinds = {device.device_kind for device in mesh.devices.flat}
    processes = len({device.process_index for device in mesh.devices.flat})
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    out.print(f"devices     {mesh.size} x {', '.join(sorted(kinds))} in {processes} processes, mesh {shape}")
    out.print(f"data        {len(source):,} photographs, {len(source) / config.batch_size:.1f} steps an epoch")
    for name, struct in program.batch_shapes(config).items():
        shape = " x ".join(map(str, struct.shape))
        out.print(f"batch       {name} {shape} {struct.dtype}, shared by {mesh.size} devices")
    for name, encoder in config.encoders.items():
        memory = program.lower(config, mesh, name).compile().memory_analysis()
        arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        out.print(
            f"memory      {name} ({encoder.name}): {(arguments + temporary) / 1e6:,.0f} MB a device, of which "
            f"{arguments / 1e6:,.0f} MB for parameters, moments, encoder and batch, and {temporary / 1e6:,.0f} MB more "
            "while a step runs"
        )
