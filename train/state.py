"""The state of a run: what a step changes, how it lies on the mesh, and how a checkpoint holds it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, PartitionSpec

from anyup_jax.layers import Unused
from anyup_jax.model import AnyUp
from train import optim, sharding
from train.config import Config

Trees = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes; with the same structure, how each of these arrays lies on the mesh.

    Attributes:
        step: optimizer steps done, an int32 scalar.
        params: trained parameters, float32, an `nnx.State`; moments and average have its structure.
        unused: published weights that never reach the output and are never trained.
        optimizer: count and moments.
        ema: moving average of `params`, or None.
        ok: a boolean scalar, False once a loss or gradient was not finite; from then on steps change nothing.
    """

    step: Any
    params: Any
    unused: Any
    optimizer: optim.Moments
    ema: Any
    ok: Any


def init_state(config: Config, model: AnyUp) -> tuple[nnx.GraphDef, TrainState]:
    """Return the model's structure, and the state before the first step with its parameters."""
    graph, params, unused = nnx.split(model, nnx.Param, Unused)
    ema = None if config.optimizer.ema_decay is None else jax.tree.map(jnp.array, params)
    moments = optim.init(config.optimizer, params)
    return graph, TrainState(jnp.zeros((), jnp.int32), params, unused, moments, ema, jnp.array(True))


def state_specs(state: TrainState, kind: str, mesh: Mesh) -> TrainState:
    """Return the PartitionSpec of every array of the state; `kind` is `mesh.parameters`."""
    whole = jax.tree.map(lambda _: PartitionSpec(), state.unused)
    return dataclasses.replace(sharding.specs(state, kind, mesh), unused=whole)


def to_trees(state: TrainState) -> Trees:
    """Return `params`, `optimizer` and `ema` (or None) as nested dictionaries, as a checkpoint holds them.

    `params` and `ema` include the unused weights: each is a whole model.
    """

    def whole(params):
        return nnx.to_pure_dict(nnx.merge_state(params, state.unused))

    moments = {name: nnx.to_pure_dict(getattr(state.optimizer, name)) for name in ("mu", "nu")}
    ema = None if state.ema is None else whole(state.ema)
    return dict(params=whole(state.params), optimizer=moments | dict(count=state.optimizer.count), ema=ema)


def from_trees(state: TrainState, step: int, trees: Trees, mesh: Mesh) -> TrainState:
    """Return the state after `step` steps with the arrays of a checkpoint; the inverse of `to_trees`."""
    params, optimizer, moments = trees["params"], trees["optimizer"], state.optimizer
    return dataclasses.replace(
        state,
        step=sharding.place(np.int32(step), PartitionSpec(), mesh),
        params=_filled(state.params, params),
        unused=_filled(state.unused, params),
        optimizer=optim.Moments(
            optimizer["count"], _filled(moments.mu, optimizer["mu"]), _filled(moments.nu, optimizer["nu"])
        ),
        ema=None if state.ema is None else _filled(state.ema, trees["ema"]),
    )


def _filled(state: nnx.State, tree: Trees) -> nnx.State:
    """Return the state with the values that the tree has at the same paths; the tree may have more."""
    values = flatten_dict(tree)
    return nnx.from_flat_state([(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(state)])
