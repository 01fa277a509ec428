"""The model of a run: its settings, which may follow from the encoder, and its making."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx

import anyup_jax
from anyup_core.config import AnyUpConfig
from anyup_core.encoders import catalogue
from anyup_core.encoders.frozen import EncoderSizes
from anyup_core.settings import require, to_dict
from anyup_core.upsamplers.config import UpsamplerConfig
from anyup_jax import upsamplers
from anyup_jax.encoders.settings import EncoderConfig
from anyup_jax.model import AnyUp
from anyup_jax.upsamplers.pretrained import model_class
from train.config import Config
from train.featup import Helpers
from train.upsamplers import FeatUpModel, OtherModel

Settings = AnyUpConfig | UpsamplerConfig


def describe(config: EncoderConfig) -> Any:
    """Return something with the `channels`, `mean` and `std` of an encoder, without reading its weights."""
    if config.stride() is None:
        return dataclasses.replace(config, weights=None, pretrained=False).load()
    sizes, published = EncoderSizes(), catalogue.find(config.name)
    sizes.choose_layers(config.name, config.layer, published.config.strides, published.config.widths)
    sizes.mean, sizes.std = published.mean, published.std  # pyright: ignore[reportAttributeAccessIssue]
    return sizes


def settings(config: Config, encoders: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of the model.

    Args:
        config: the run.
        encoders: name -> an encoder, or what `describe` returns; None to describe those of the run.

    Raises ValueError for encoders that the model cannot be trained with.
    """
    model = config.model
    if not isinstance(model, OtherModel):
        return model
    if isinstance(model, FeatUpModel):
        for name, encoder in config.encoders.items():
            remedy = "its views are made within the compiled step; name one of anyup_jax.encoders.names()"
            require(encoder.stride() is not None, f"encoders.{name}.name", encoder.name, f"of featup, {remedy}")
    if encoders is None:
        encoders = {name: describe(encoder) for name, encoder in config.encoders.items()}
    given = getattr(model, "channels", None)
    found = {
        name: model.settings(given or x.channels, (tuple(map(float, x.mean)), tuple(map(float, x.std))))
        for name, x in encoders.items()
    }
    (first, chosen), *others = found.items()
    for name, other in others:
        if other != chosen:
            what = "width" if other.width != chosen.width else "normalisation"
            raise ValueError(
                f"encoders={list(encoders)} cannot be: {model.upsampler} is trained for one encoder, and {first} and "
                f"{name} differ in their {what}; name one of them."
            )
    for name, encoder in encoders.items():
        width = chosen.width
        require(width in (None, encoder.channels), "model.channels", width,
                f"the encoder {name} has {encoder.channels}; leave model.channels out")  # fmt: skip
        heads = f"it must divide the {encoder.channels} channels of the encoder {name}"
        require(encoder.channels % chosen.multiple == 0, "model.num_heads", chosen.multiple, heads)
    return chosen


def record(config: Config, chosen: Settings) -> dict[str, Any]:
    """Return the configuration as a checkpoint has it: the settings of another upsampler are complete there."""
    plain = to_dict(config)
    if isinstance(config.model, OtherModel):
        plain["model"] = dict(upsampler=config.model.upsampler, **to_dict(chosen))
    return plain


def create(config: Config, chosen: Settings, *, initial: Any = None) -> nnx.Module:
    """Return the model before the first step, of FeatUp with what only its training needs.

    Args:
        config: the run.
        chosen: from `settings`.
        initial: the weights to start with, as `from_pretrained` takes them; None for random ones.

    Raises ValueError for weights of another model, and what `from_pretrained` raises.
    """
    dtype, rngs = jnp.dtype(config.dtype), nnx.Rngs(config.seed)
    if isinstance(chosen, AnyUpConfig):
        if initial is None:
            return AnyUp(chosen, rngs=rngs, dtype=dtype)
        model = anyup_jax.from_pretrained(initial, dtype=dtype, backend=chosen.backend)
        dim, given = chosen.input_dim, model.config.input_dim
        remedy = f"the guidance of that model has {given} channels, and model.input_dim={dim}"
        require(given == dim, "checkpoint.init_from", initial, remedy)
        return model
    name = config.model.upsampler if isinstance(config.model, OtherModel) else ""
    other: Any
    if initial is None:
        other = model_class(name)(chosen, rngs=rngs, dtype=dtype)
    else:
        free = {k: v for k, v in dataclasses.asdict(chosen).items() if k not in chosen.decided}
        other = cast(Any, upsamplers.from_pretrained(name, initial, dtype=dtype, **free))
        given = other.config
        require(given == chosen, "checkpoint.init_from", initial, f"it is {given}, and the run asks for {chosen}")
    if isinstance(config.model, FeatUpModel):
        patch = {encoder.stride() for encoder in config.encoders.values()}
        require(len(patch) == 1, "encoders", list(config.encoders), "featup needs encoders of one stride")
        other.helpers = Helpers(chosen.width, patch.pop() or 1, rngs=nnx.Rngs(config.seed + 1))
    return other
