"""An encoder as a setting of a training run or of an evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

from anyup_core.encoders import catalogue
from anyup_core.encoders.frozen import EncoderSizes
from anyup_core.paths import PathText


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """One frozen encoder to learn from.

    Attributes:
        name: one of `anyup_jax.encoders.names()`, which runs within the compiled step, or `timm:NAME`, any timm model,
            which runs in PyTorch.
        weights: a file or directory with its weights; None for the published ones.
        pretrained: False for a random initialisation, for tests.
        layer: indices of the blocks or stages whose outputs, concatenated along the channels, are the features.
        norm: apply the model's final norm.
    """

    name: str
    weights: PathText | None = None
    pretrained: bool = True
    layer: tuple[int, ...] = (-1,)
    norm: bool = True

    def stride(self) -> int | None:
        """Return its pixels per cell without reading weights; None for a timm model, which has to be built to know it.

        Raises:
            ValueError: for an unknown name or layer.
        """
        from anyup_jax.encoders.timm_bridge import PREFIX  # a configuration is read without importing jax

        if self.name.startswith(PREFIX):
            return None
        sizes, config = EncoderSizes(), catalogue.find(self.name).config
        sizes.choose_layers(self.name, self.layer, config.strides, config.widths)
        return sizes.stride

    def load(self, dtype: str = "float32", *, class_token: bool = False) -> Any:
        """Return the encoder, in Flax or, for `timm:NAME`, in PyTorch; with `class_token` it returns that token too.

        Raises:
            OSError, ValueError, ImportError: as `encoders.create` does.
        """
        import jax.numpy as jnp

        from anyup_jax import encoders
        from anyup_jax.encoders import timm_bridge

        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        if self.name.startswith(timm_bridge.PREFIX):
            return timm_bridge.create(self.name.removeprefix(timm_bridge.PREFIX), class_token=class_token, **options)
        return encoders.create(self.name, class_token=class_token, dtype=jnp.dtype(dtype), **options)


def check_cells(setting: str, size: tuple[int, int], name: str, patch: int) -> None:
    """Raise ValueError unless a height and width, the value of a setting, are whole cells of the encoder `name`."""
    if any(side % patch for side in size):
        nearest = tuple(max(patch, round(side / patch) * patch) for side in size)
        raise ValueError(
            f"{setting}={size} is not a multiple of the {patch} pixels of a cell of the encoder {name}; "
            f"take {nearest}, or another encoder or layer."
        )
