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

from train import optim, sharding
from train.config import Config

Trees = dict[str, Any]
HELPERS = "helpers"  # the part of a model that only its training needs; see `train.featup`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes; with the same structure, how each of these arrays lies on the mesh.

    Attributes:
        step: optimizer steps done, an int32 scalar.
        params: trained parameters, float32, an `nnx.State`; moments and average have its structure.
        unused: weights that are never trained: published ones that never reach the output, and tables.
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


def trained(path: tuple[Any, ...], variable: Any) -> bool:
    """Return whether a weight is trained; FeatUp's channel norm is not, as in its published training."""
    return isinstance(variable, nnx.Param) and path[0] != "norm"


def init_state(config: Config, model: nnx.Module) -> tuple[nnx.GraphDef, TrainState]:
    """Return the model's structure, and the state before the first step with its parameters."""
    graph, params, unused = nnx.split(model, trained, ...)
    ema = None if config.optimizer.ema_decay is None else jax.tree.map(jnp.array, params)
    moments = optim.init(config.optimizer, params)
    return graph, TrainState(jnp.zeros((), jnp.int32), params, unused, moments, ema, jnp.array(True))


def state_specs(state: TrainState, kind: str, mesh: Mesh) -> TrainState:
    """Return the PartitionSpec of every array of the state; `kind` is `mesh.parameters`."""
    whole = jax.tree.map(lambda _: PartitionSpec(), state.unused)
    return dataclasses.replace(sharding.specs(state, kind, mesh), unused=whole)


def to_trees(state: TrainState) -> Trees:
    """Return `params`, `optimizer`, `ema` and `helpers` as nested dictionaries, as a checkpoint holds them.

    `params` and `ema` include the unused weights: each is a whole model. What only the training needs is in `helpers`.
    `ema` and `helpers` are None in a run without them.
    """

    def whole(params):
        tree = nnx.to_pure_dict(nnx.merge_state(params, state.unused))
        return {name: part for name, part in tree.items() if name != HELPERS}

    helpers = nnx.to_pure_dict(state.params).get(HELPERS)
    moments = {name: nnx.to_pure_dict(getattr(state.optimizer, name)) for name in ("mu", "nu")}
    ema = None if state.ema is None else whole(state.ema)
    optimizer = moments | dict(count=state.optimizer.count)
    return dict(params=whole(state.params), optimizer=optimizer, ema=ema, helpers=helpers)


def from_trees(state: TrainState, step: int, trees: Trees, mesh: Mesh) -> TrainState:
    """Return the state after `step` steps with the arrays of a checkpoint; the inverse of `to_trees`.

    The average of the helpers, which nothing reads, is not kept: it begins again with their values.
    """
    helpers = {} if (kept := trees.get("helpers")) is None else {HELPERS: kept}
    params, optimizer, moments = trees["params"] | helpers, trees["optimizer"], state.optimizer
    return dataclasses.replace(
        state,
        step=sharding.place(np.int32(step), PartitionSpec(), mesh),
        params=_filled(state.params, params),
        unused=_filled(state.unused, params),
        optimizer=optim.Moments(
            optimizer["count"], _filled(moments.mu, optimizer["mu"]), _filled(moments.nu, optimizer["nu"])
        ),
        ema=None if state.ema is None else _filled(state.ema, trees["ema"] | helpers),
    )


def _filled(state: nnx.State, tree: Trees) -> nnx.State:
    """Return the state with the values that the tree has at the same paths; the tree may have more."""
    values = flatten_dict(tree)
    return nnx.from_flat_state([(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(state)])
