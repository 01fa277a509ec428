"""The step as a program that is compiled but not run: for `--dry-run`, and for pods that need not be at hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from train import encoders, models, sharding
from train.config import Config
from train.state import TrainState, init_state, state_specs
from train.step import StepPlan, make_step
from train.upsamplers import OtherModel


def abstract_state(config: Config) -> tuple[nnx.GraphDef, TrainState]:
    """Return the model's structure, and the state with shapes in place of arrays."""
    chosen = models.settings(config)
    model = nnx.eval_shape(lambda: models.create(config, chosen))
    graph = nnx.graphdef(model)
    return graph, jax.eval_shape(lambda model: init_state(config, model)[1], model)


def lower(config: Config, mesh: Mesh, name: str) -> jax.stages.Lowered:
    """Return the step of the encoder called `name`, lowered for the devices of the mesh, without weights or data.

    Of `features.shares`, the step takes the largest. Means and deviations that are not measured yet are 0 and 1.
    """
    if config.bands is not None and config.dataset.mean is None:
        data = dataclasses.replace(config.dataset, mean=(0.0,) * config.bands, std=(1.0,) * config.bands)
        config = dataclasses.replace(config, dataset=data)
    graph, state = abstract_state(config)
    specs = state_specs(state, config.mesh.parameters, mesh)
    chosen = dataclasses.replace(config.encoders[name], weights=None, pretrained=False)
    in_pytorch = chosen.stride() is None
    encoder = chosen.load(config.dtype) if in_pytorch else nnx.eval_shape(lambda: chosen.load(config.dtype))
    structure, encoder_state, encoder_specs = encoders.split(encoder, config.mesh.encoders, mesh)
    sizes = dataclasses.replace(encoders.step_sizes(config, encoder.stride, 0), share=max(config.features.shares))
    batch = batch_shapes(config)
    if in_pytorch:
        cells = (side // encoder.stride for side in sizes.whole)
        for key, shape in dict(lr=cells, hr=(config.views.num_local_crops, *sizes.crop_cells)).items():
            batch[key] = jax.ShapeDtypeStruct((config.batch_size, *shape, encoder.channels), jnp.float32)
    shapes = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        (state, encoder_state, batch),
        (specs, encoder_specs, dict.fromkeys(batch, sharding.BATCH)),
    )
    with jax.set_mesh(mesh):
        return make_step(StepPlan(config, graph, specs, sizes, mesh, structure, encoder_specs)).lower(*shapes)


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch's arrays, over all devices."""
    channels, dtype = (3, jnp.uint8) if config.bands is None else (config.bands, jnp.float32)
    photographs = jax.ShapeDtypeStruct((config.batch_size, *config.dataset.crop_size, channels), dtype)
    crops = jax.ShapeDtypeStruct((config.batch_size, config.views.num_local_crops, 2), jnp.float32)
    batch = dict(image=photographs, augmented=photographs, crops=crops)
    if isinstance(config.model, OtherModel):
        del batch["augmented"]
    if config.dataset.pasted_regions:
        batch["regions"] = jax.ShapeDtypeStruct(photographs.shape[:3], jnp.uint8)
    return batch
