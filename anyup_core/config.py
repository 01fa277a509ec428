"""Hyper-parameters of AnyUp."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

from anyup_core.settings import require

NORM_GROUPS = 8  # groups of every GroupNorm
WINDOWS = ("paper", "natten")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyUpConfig:
    """Architecture of one AnyUp model; the argument names are those of the published implementation.

    Attributes:
        input_dim: channels of the guidance image.
        qk_dim: width D of guide, queries and keys; a multiple of 8 and of `num_heads`.
        kernel_size: odd side of the image encoder's first convolution.
        kernel_size_lfu: odd side of the filters that unify the features.
        lfu_dim: number M of those filters, a multiple of 8; `qk_dim` if None.
        window_ratio: half-width r of the attention window as a share of the feature map; 0 or less means every key.
        num_heads: attention heads N.
        init_gaussian_derivatives: start the filters as Gaussian derivatives instead of white noise.
        window: which keys a query sees: "paper", or "natten", the windows of the published model's NATTEN variant.
        backend: how attention is computed: "auto", or a name in `attention.BACKENDS`. It never changes the result.

    Raises:
        ValueError: if a field has a value no model can have.
    """

    input_dim: int = 3
    qk_dim: int = 128
    kernel_size: int = 1
    kernel_size_lfu: int = 5
    lfu_dim: int | None = None
    window_ratio: float = 0.1
    num_heads: int = 4
    init_gaussian_derivatives: bool = False
    window: Literal["paper", "natten"] = "paper"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("input_dim", "qk_dim", "kernel_size", "kernel_size_lfu", "num_heads", "filters"):
            value, field = getattr(self, name), "lfu_dim" if name == "filters" else name
            positive = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(positive, field, value, "it must be a positive integer")
            if name in ("kernel_size", "kernel_size_lfu"):
                require(value % 2, field, value, "it must be odd, so that a pixel is the centre of its patch")
            if name in ("qk_dim", "filters"):
                require(
                    value % NORM_GROUPS == 0, field, value, f"it must be a multiple of the {NORM_GROUPS} norm groups"
                )
        heads = f"it must be a multiple of num_heads={self.num_heads}"
        require(self.qk_dim % self.num_heads == 0, "qk_dim", self.qk_dim, heads)
        finite = isinstance(self.window_ratio, int | float) and math.isfinite(self.window_ratio)
        require(finite, "window_ratio", self.window_ratio, "it must be a finite number; 0 lets a query see every key")
        require(self.window in WINDOWS, "window", self.window, f"choose one of {', '.join(WINDOWS)}")

    @property
    def filters(self) -> int:
        """Number M of filters of the feature unification."""
        return self.qk_dim if self.lfu_dim is None else self.lfu_dim

    @property
    def head_dim(self) -> int:
        """Channels K of one attention head."""
        return self.qk_dim // self.num_heads

    @property
    def parameters(self) -> int:
        """Number of parameters of a model, those that never reach the output among them."""
        dim, filters = self.qk_dim, self.filters
        block = 2 * dim**2 + 4 * dim  # two convolutions and two norms
        image, key, query, aggregation = self.input_dim * self.kernel_size**2, dim, dim, 9 * 2 * dim
        encoders = dim * (image + key + query + aggregation) + 4 * 2 * block
        first_block = 2 * filters + filters * dim + 2 * dim + dim**2 + (filters * dim if filters != dim else 0)
        features = filters * self.kernel_size_lfu**2 + first_block + block
        attention = 9 * dim**2 + 2 * dim + 4 * (dim**2 + dim)  # the 3 x 3 convolution, two norms, four projections
        return encoders + features + attention + 2 * dim  # and the frequencies

    @classmethod
    def of(cls, config: AnyUpConfig | None, **fields: Any) -> AnyUpConfig:
        """Return the settings that a model is made with: `config`, or the default ones, with some fields changed.

        Raises:
            TypeError: for a `config` of another type.
            TypeError, ValueError: as `replace`.
        """
        if not isinstance(config, cls | None):
            raise TypeError(
                f"config={config!r} is no AnyUpConfig; give the settings by their names: AnyUp(qk_dim=128)."
            )
        return (config or cls()).replace(**fields)

    def replace(self, **overrides: Any) -> AnyUpConfig:
        """Return a copy with some fields changed.

        `use_natten`, an argument of the published model, is understood too: `use_natten=True` is `window="natten"`.

        Raises:
            TypeError: for a field that does not exist.
            ValueError: for a value no model can have, and for `use_natten` beside another `window`.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if "use_natten" in overrides:
            window = "natten" if overrides.pop("use_natten") else "paper"
            agree = overrides.setdefault("window", window) == window
            require(agree, "window", overrides["window"], f"use_natten asks for window={window!r}; give one of them")
        if unknown := sorted(set(overrides) - set(known)):
            raise TypeError(f"AnyUpConfig has no field {', '.join(unknown)}; its fields are {', '.join(known)}.")
        return dataclasses.replace(self, **overrides)

    def same_weights(self, **changes: Any) -> AnyUpConfig:
        """Return a copy with changes that models with the same weights may have.

        Raises:
            TypeError, ValueError: as `replace`, and ValueError for fields that decide the shapes of the weights.
        """
        config = self.replace(**changes)
        for name in ("input_dim", "qk_dim", "kernel_size", "kernel_size_lfu", "filters"):
            before, after, field = getattr(self, name), getattr(config, name), "lfu_dim" if name == "filters" else name
            require(before == after, field, after, f"the weights are for {before}; make a new model for other shapes")
        return config

    def to_json(self) -> str:
        """Return the fields as a JSON object; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | Path) -> AnyUpConfig:
        """Read what `to_json` wrote, from a string or from a file."""
        if isinstance(text, Path):
            text = text.read_text()
        return cls().replace(**json.loads(text))
