"""Presets of evaluations for hydra: `+experiment=NAME` and the groups `encoders` and `probe`."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore

from anyup_core.settings import defaults
from anyup_jax.encoders.settings import EncoderConfig
from evaluation.config import Config, DatasetConfig, ProbeConfig, UpsamplerConfig
from train.presets import DINOV2_S, HYDRA, QUIET

NAME = "evaluation"  # of the configuration that `evaluation.run` changes

LITE = {
    f"lite{size}_stride{stride}": dict(name=f"efficientnet_lite{size}", layer=[layer])
    for size in range(3)
    for stride, layer in ((16, -2), (32, -1))
}
ENCODERS: dict[str, dict[str, dict[str, Any]]] = {
    "lite0": {"lite0": dict(name="efficientnet_lite0")},
    "efficientnet_lite": LITE,
    "dinov2_s": {"dinov2_s": dict(name=DINOV2_S)},
    "dinov2_s_unnormed": {"dinov2_s": dict(name=DINOV2_S, norm=False)},
    "dinov2_s_four_layers": {"dinov2_s": dict(name=DINOV2_S, norm=False, layer=[2, 5, 8, 11])},
}
PROBES: dict[str, dict[str, Any]] = {
    "segmentation": {},
    "geometry": dict(
        weight_decay=0.01, schedule="warmup_cosine", epochs=10, batch_size=8, flip=False, class_token=True, augment=True
    ),
}
NYU = dict(kind="nyu", size=[224, 224])
EXPERIMENTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cutouts": ("efficientnet_lite", "segmentation", dict(dataset=dict(kind="folder"), probe=dict(pixel_stride=2))),
    "voc": ("dinov2_s", "segmentation", dict(dataset=dict(kind="voc"))),
    "ade20k": ("dinov2_s", "segmentation", dict(dataset=dict(kind="ade20k"))),
    "cityscapes": ("dinov2_s", "segmentation", dict(dataset=dict(kind="cityscapes"))),
    "cocostuff27": ("dinov2_s", "segmentation", dict(dataset=dict(kind="cocostuff27"), probe=dict(epochs=5))),
    "nyu_depth": ("dinov2_s_unnormed", "geometry", dict(task="depth", dataset=NYU)),
    "nyu_normals": ("dinov2_s_unnormed", "geometry", dict(task="normals", dataset=NYU)),
}
"""Name of a preset -> the encoders and the probe that it chooses, and the settings that it changes."""


def register() -> None:
    """Register groups and presets with hydra."""
    store = ConfigStore.instance().store
    for name, members in ENCODERS.items():
        store(name=name, group="encoders", node={k: defaults(EncoderConfig, **v) for k, v in members.items()})
    for name, changes in PROBES.items():
        store(name=name, group="probe", node=defaults(ProbeConfig, **changes))
    for name, (encoders, probe, changes) in EXPERIMENTS.items():
        choices = [{"override /encoders": encoders}, {"override /probe": probe}, "_self_"]
        store(name=name, group="experiment", package="_global_", node={"defaults": choices, **changes})
    rest = defaults(Config, dataset=defaults(DatasetConfig), anyup=defaults(UpsamplerConfig))
    choices = [{"encoders": "lite0"}, {"probe": "segmentation"}, *QUIET, "_self_"]
    store(name=NAME, node={"defaults": choices, **{k: v for k, v in rest.items() if k != "probe"}, "hydra": HYDRA})
