"""The step as a program that is compiled and not run: for `--dry-run`, and for pods that need not be there."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from anyup_core.encoders import catalogue
from anyup_jax.encoders import creation, timm_bridge
from anyup_jax.encoders.encoder import Encoder
from anyup_jax.model import AnyUp
from train import encoders, sharding
from train.config import Config, EncoderConfig
from train.step import TrainState, init_state, make_step, state_specs

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def abstract_state(config: Config) -> tuple[nnx.GraphDef, TrainState]:
    """Return the model's structure and the state's shapes."""

    def build():
        model = AnyUp(config.model, rngs=nnx.Rngs(config.seed), dtype=jnp.dtype(config.dtype))
        graphs.append(init_state(config, model))
        return graphs[-1][1]

    graphs: list[Any] = []
    state = jax.eval_shape(build)
    return graphs[0][0], state


def abstract_encoder(config: EncoderConfig, dtype: str) -> Encoder:
    """Return a Flax encoder that has shapes in place of weights."""
    published = catalogue.find(config.name)
    layer = config.layer if len(config.layer) > 1 else config.layer[0]
    options = dict(layer=layer, norm=config.norm, dtype=jnp.dtype(dtype))
    return nnx.eval_shape(
        lambda: Encoder(creation.backbone(published.config, options["dtype"], False, 0), published, **options)
    )


def lower(config: Config, mesh: Mesh, name: str) -> jax.stages.Lowered:
    """Return the step of the encoder called `name`, lowered for the devices of the mesh, without weights or data.

    Of the shares of its channels, it is the step of the largest.
    """
    graph, state = abstract_state(config)
    specs = state_specs(state, config.mesh.parameters, mesh)
    chosen = config.encoders[name]
    largest = functools.partial(dataclasses.replace, share=max(config.features.shares))

    def placed(tree, tree_specs):
        struct = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
        return jax.tree.map(struct, tree, tree_specs)

    whole = jax.tree.map(lambda _: sharding.BATCH, batch := batch_shapes(config))
    if chosen.name.startswith(timm_bridge.PREFIX):
        encoder = dataclasses.replace(chosen, weights=None, pretrained=False).load(config.dtype)
        sizes, structure, frozen = largest(encoders.geometry(config, encoder.stride, 0)), None, ()
        cells = (side // encoder.stride for side in sizes.whole)
        maps = {
            "lr": (*cells, encoder.channels),
            "hr": (config.dataset.num_local_crops, *sizes.crop_cells, encoder.channels),
        }
        batch |= {key: jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32) for key, shape in maps.items()}
        whole = jax.tree.map(lambda _: sharding.BATCH, batch)
    else:
        encoder = abstract_encoder(chosen, config.dtype)
        sizes = largest(encoders.geometry(config, encoder.stride, 0))
        encoder_graph, encoder_state = nnx.split(encoder)
        encoder_specs = sharding.specs(encoder_state, config.mesh.encoders, mesh)
        structure, frozen = (encoder_graph, encoder_specs), placed(encoder_state, encoder_specs)
    step = make_step(config, graph, specs, sizes, mesh, structure)
    with jax.set_mesh(mesh):
        return step.lower(placed(state, specs), frozen, placed(batch, whole))


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what a batch brings to the devices, over all of them."""
    photographs = jax.ShapeDtypeStruct((config.batch_size, *config.dataset.crop_size, 3), jnp.uint8)
    crops = jax.ShapeDtypeStruct((config.batch_size, config.dataset.num_local_crops, 2), jnp.float32)
    batch = dict(image=photographs, augmented=photographs, crops=crops)
    if config.dataset.pasted_regions:
        batch["regions"] = jax.ShapeDtypeStruct(photographs.shape[:3], jnp.uint8)
    return batch


def collectives(text: str) -> dict[str, int]:
    """Count the operations of a compiled program that exchange data between devices."""
    return {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in COLLECTIVES}
