"""The upsamplers that can be trained beside AnyUp, as settings of a run: JAFAR, NAF and FeatUp; LoftUp is refused."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from anyup_core.preprocessing import IMAGENET, Preprocessing
from anyup_core.settings import require
from anyup_core.upsamplers.config import UpsamplerConfig
from anyup_core.upsamplers.featup import FeatUpConfig
from anyup_core.upsamplers.jafar import JAFARConfig
from anyup_core.upsamplers.naf import NAFConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherModel:
    """What the recipes differ in; subclasses add the settings of the model.

    Attributes:
        upsampler: name of the method.
        scales: least and greatest scale at which the encoder sees the input, in units of `dataset.crop_size`; the
            targets are its features of the whole crop. None where input and target are the same size.
        guidance: side of the guidance in units of `dataset.crop_size`.
        input_dim: channels of the guidance.
    """

    upsampler: Any = None
    scales: ClassVar[tuple[float, float] | None] = None
    guidance: ClassVar[float] = 1.0
    input_dim: ClassVar[int] = 3

    def settings(self, channels: int, normalisation: Preprocessing) -> UpsamplerConfig:
        """Return the settings of the model for an encoder with so many channels and this mean and deviation."""
        raise NotImplementedError

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "upsampler"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JAFARModel(OtherModel):
    """JAFAR (`anyup_core.upsamplers.jafar.JAFARConfig`).

    Attributes:
        channels: of the encoder's features, which have to be the same in all encoders; None to take the encoder's.
        qk_dim, kernel_size, num_heads: as there. The image is normalised as the encoder's.
    """

    upsampler: Literal["jafar"] = "jafar"
    channels: int | None = None
    qk_dim: int = 128
    kernel_size: int = 1
    num_heads: int = 4
    scales: ClassVar[tuple[float, float] | None] = (0.25, 0.5)
    guidance: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        self.settings(1 if self.channels is None else self.channels, IMAGENET)

    def settings(self, channels: int, normalisation: Preprocessing) -> JAFARConfig:
        given: dict[str, Any] = self._given() | dict(channels=channels, normalisation=normalisation)
        return JAFARConfig(**given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NAFModel(OtherModel):
    """NAF for encoders of any width; the settings are those of `anyup_core.upsamplers.naf.NAFConfig`."""

    upsampler: Literal["naf"] = "naf"
    dim: int = 256
    kernel_size: int = 9
    num_heads: int = 4
    rope_heads: int = 4
    scales: ClassVar[tuple[float, float] | None] = (0.5, 0.5)
    guidance: ClassVar[float] = 0.25

    def __post_init__(self) -> None:
        NAFConfig(**self._given())

    def settings(self, channels: int, normalisation: Preprocessing) -> NAFConfig:
        return NAFConfig(**self._given())


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatUpModel(OtherModel):
    """FeatUp's stack of joint bilateral upsamplers.

    Attributes:
        channels: of the encoder's features, which have to be the same in all encoders; None to take the encoder's.
        channel_norm: normalise the channels of each position first.
    """

    upsampler: Literal["featup"] = "featup"
    channels: int | None = None
    channel_norm: bool = True

    def __post_init__(self) -> None:
        self.settings(1 if self.channels is None else self.channels, IMAGENET)

    def settings(self, channels: int, normalisation: Preprocessing) -> FeatUpConfig:
        return FeatUpConfig(channels=channels, channel_norm=self.channel_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftUpModel(OtherModel):
    """LoftUp, which cannot be trained here. Raises ValueError."""

    upsampler: Literal["loftup"] = "loftup"

    def __post_init__(self) -> None:
        remedy = "neither LoftUp's training code nor its recipe is published; train jafar, naf, featup or anyup"
        require(False, "model", self.upsampler, remedy)
