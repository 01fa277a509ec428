"""The whole model with the image's rows spread over the devices of a mesh axis."""

from __future__ import annotations

import functools

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from anyup_core.config import AnyUpConfig
from anyup_jax.row_shards import DeviceRows


def row_sharding(image: Float[Array | np.ndarray, "B H W input_dim"]) -> NamedSharding | None:
    """Return the sharding of an image whose rows are spread over a mesh axis, else None."""
    sharding = getattr(image, "sharding", None)
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) < 2 or sharding.spec[1] is None:
        return None
    return sharding


def check(
    config: AnyUpConfig, image: tuple[int, ...], output_size: tuple[int, int], mesh: Mesh | AbstractMesh, spec: P
) -> None:
    """Raise ValueError if an image of this shape, or its output, cannot be cut into equal shards."""
    if any(axis is not None for axis in spec[2:]):
        raise ValueError(f"An image may be spread over its batch and its rows only, got {spec}.")
    if isinstance(spec[1], tuple) and len(spec[1]) > 1:
        raise ValueError(f"The rows of an image may be spread over one mesh axis, got {spec[1]}.")
    count = mesh.shape[_axis(spec)]
    if image[1] % count or output_size[0] % count:
        raise ValueError(
            f"The rows of the image ({image[1]}) and of the output ({output_size[0]}) must be multiples of the "
            f"{count} devices that share them; pad or resize the image, or use fewer devices."
        )
    if image[1] // count <= config.kernel_size // 2:
        raise ValueError(
            f"Each of {count} devices has {image[1] // count} rows of the image, and a kernel of {config.kernel_size} "
            f"needs more than {config.kernel_size // 2}; use fewer devices."
        )


@functools.partial(jax.jit, static_argnames=("graph", "output_size", "q_chunk_size", "mesh", "spec"))
def compiled(
    graph: nnx.GraphDef, state: nnx.State, image, maps, output_size, q_chunk_size, mesh: Mesh, spec: P
) -> list[Float[Array, "B Ho Wo _"]]:
    """The program behind `upsample` for such an image; the rows of the outputs are spread as the image's are.

    Every device keeps all keys and values, which are small, and its own rows of the guide and of the queries. Norms
    exchange their sums, convolutions a row with the neighbours, and the keys' pooling its result.
    """
    batch, axis = spec[0], _axis(spec)
    rows = DeviceRows(axis, mesh.shape[axis])

    def attend(state, image, maps):
        return nnx.merge(graph, state).attend(image, maps, output_size, q_chunk_size, rows)

    spread, whole = P(batch, axis), P(batch)
    shards = jax.shard_map(attend, mesh=mesh, in_specs=(P(), spread, whole), out_specs=spread, check_vma=False)
    return shards(state, image, maps)


def _axis(spec: P) -> str:
    """Return the mesh axis that the rows are spread over."""
    return spec[1][0] if isinstance(spec[1], tuple) else spec[1]
