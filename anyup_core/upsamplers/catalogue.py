"""The upsamplers by their names."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from anyup_core.upsamplers.config import UpsamplerConfig
from anyup_core.upsamplers.featup import FeatUpConfig
from anyup_core.upsamplers.interpolation import InterpolationConfig
from anyup_core.upsamplers.jafar import JAFARConfig
from anyup_core.upsamplers.joint_bilateral import JointBilateralConfig
from anyup_core.upsamplers.loftup import LoftUpConfig
from anyup_core.upsamplers.naf import NAFConfig

ANYUP = "anyup"


@dataclasses.dataclass(frozen=True)
class Method:
    """One upsampler.

    Attributes:
        module: of `anyup_jax.upsamplers` and of `anyup_torch.upsamplers`.
        model: name of the class in both modules.
        config: of its settings.
        settings: those that the name decides.
    """

    module: str
    model: str
    config: type[UpsamplerConfig]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def weightless(self) -> bool:
        return not any(self.config(**self.settings).rows())


METHODS = {
    "jafar": Method("jafar", "JAFAR", JAFARConfig),
    "featup": Method("featup", "FeatUp", FeatUpConfig),
    "loftup": Method("loftup", "LoftUp", LoftUpConfig),
    "naf": Method("naf", "NAF", NAFConfig),
    "bilinear": Method("interpolation", "Interpolation", InterpolationConfig, {"kernel": "bilinear"}),
    "bicubic": Method("interpolation", "Interpolation", InterpolationConfig, {"kernel": "bicubic"}),
    "nearest": Method("interpolation", "Interpolation", InterpolationConfig, {"kernel": "nearest"}),
    "joint_bilateral": Method("joint_bilateral", "JointBilateral", JointBilateralConfig),
}
"""All but AnyUp, which has a package of its own."""

NAMES = (ANYUP, *METHODS)
ENTRIES = tuple(dict.fromkeys(entry for method in METHODS.values() for entry in method.config.entries))
"""Keys of training checkpoints under which the state dict of some method may be."""


def find(name: str) -> Method:
    """Return a method by its name. Raises ValueError if there is none, with names that are close."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(str(name), NAMES, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"{name!r} is no upsampler.{hint} The names are {', '.join(NAMES)}.")
