"""Processes, the mesh `(data, model)`, and how arrays are sharded over it."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anyup_core import checks
from train.config import MeshConfig

AXES = ("data", "model")
BATCH = PartitionSpec(AXES)  # every device has photographs of its own
HEARTBEAT = 60  # seconds without a sign of life, after which another process counts as dead
SMALLEST_SHARDED = 2048  # smaller arrays are replicated; a number of entries


def join(config: MeshConfig) -> None:
    """Join the other processes of the run, before jax is asked for devices. Do nothing if there are none.

    Raises ValueError if some are announced and cannot be found.
    """
    announcement = config.announcement()
    if announcement is None or jax.distributed.is_initialized():
        return
    if config.coordinator is not None:
        jax.distributed.initialize(
            config.coordinator, config.num_processes, config.process_id, heartbeat_timeout_seconds=HEARTBEAT
        )
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except Exception as error:  # jax reads the variables of each cluster in its own way
        raise ValueError(
            f"{announcement} announces other processes, but jax does not find them ({error}); give "
            "mesh.distributed=off to train alone, or mesh.coordinator, mesh.num_processes and mesh.process_id."
        ) from error


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Return the mesh of all devices. Raises ValueError if they do not fit the configured mesh."""
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    model = count // config.data if config.model == -1 else config.model
    data = count // model if config.data == -1 else config.data
    if data * model != count:
        raise ValueError(
            f"mesh.data={config.data} and mesh.model={config.model} do not fit {count} devices; their product must be "
            f"{count}, and mesh.data=-1 takes what mesh.model leaves."
        )
    if data % config.slices:
        raise ValueError(f"mesh.slices={config.slices} must divide the {data} devices of the axis data.")
    if config.slices > 1:
        shape, slices = (data // config.slices, model), (config.slices, 1)
        arranged = mesh_utils.create_hybrid_device_mesh(shape, slices, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raise ValueError unless each device gets a whole number of photographs of a step, or of each part of one."""
    if batch_size % (mesh.size * accumulate):
        parts = f" in optimizer.accumulate={accumulate} parts" if accumulate > 1 else ""
        processes = len({device.process_index for device in mesh.devices.flat})
        raise ValueError(
            f"batch_size={batch_size} cannot be shared out among {mesh.size} devices of {processes} processes{parts}; "
            f"make it a multiple of {mesh.size * accumulate}."
        )


def check_memory(batch: dict[str, jax.ShapeDtypeStruct], batch_size: int, processes: int) -> None:
    """Raise ValueError if a process's share of a batch of these global shapes is larger than its machine's memory."""
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values()) // processes
    checks.check_memory(f"batch_size={batch_size} (the photographs of one step)", needed)


def specs(tree: Any, kind: str, mesh: Mesh) -> Any:
    """Return the PartitionSpec of each array of a tree: whole, or if `kind` is "fsdp" sharded.

    The sharded axis is the longest whose length the axis `model` divides.
    """
    parts = mesh.shape["model"]

    def spec(x):
        axes = [i for i in np.argsort(x.shape)[::-1] if x.shape[i] % parts == 0]
        if kind == "replicated" or parts == 1 or not axes or np.prod(x.shape) < SMALLEST_SHARDED:
            return PartitionSpec()
        return PartitionSpec(*(None,) * int(axes[0]), "model")

    return jax.tree.map(spec, tree)


def sharded_axis(spec: PartitionSpec) -> int | None:
    """Return the array's axis that is sharded over the axis `model`; None if every device has the whole array."""
    return spec.index("model") if "model" in spec else None


def gather(tree: Any, tree_specs: Any) -> Any:
    """Return whole arrays from their shards, within `shard_map`; its gradient is a reduce-scatter."""

    def whole(x, spec):
        axis = sharded_axis(spec)
        return x if axis is None else lax.all_gather(x, "model", axis=axis, tiled=True)

    return jax.tree.map(whole, tree, tree_specs)


def place(tree: Any, tree_specs: Any, mesh: Mesh) -> Any:
    """Place arrays, which every process has in full, on the mesh."""

    def put(x, spec):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    return jax.tree.map(put, tree, tree_specs)


def place_batch(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return global arrays, given this process's share of a batch."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), arrays)
