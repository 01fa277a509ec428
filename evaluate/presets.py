"""Presets of evaluations for hydra: `+experiment=NAME`, and the groups `encoders` and `probe`."""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra.core.config_store import ConfigStore

from anyup_jax.encoders.settings import EncoderConfig
from evaluate.config import Config, DatasetConfig, ProbeConfig, UpsamplerConfig

NAME = "evaluate"  # of the configuration that `evaluate.run` starts from

LITE = {
    f"lite{size}_stride{stride}": dict(name=f"efficientnet_lite{size}", layer=[layer])
    for size in range(3)
    for stride, layer in ((16, -2), (32, -1))
}
ENCODERS: dict[str, dict[str, dict[str, Any]]] = {
    "lite0": {"lite0": dict(name="efficientnet_lite0")},
    "efficientnet_lite": LITE,
    "dinov2_s": {"dinov2_s": dict(name="vit_small_patch14_dinov2.lvd142m")},
}
PROBES: dict[str, dict[str, Any]] = {
    "segmentation": {},
    "geometry": dict(weight_decay=0.01, epochs=10, batch_size=8, schedule="warmup_cosine", flip=False),
}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "cutouts": dict(encoders="efficientnet_lite", dataset=dict(kind="folder"), probe=dict(pixel_stride=2)),
    "voc": dict(encoders="dinov2_s", dataset=dict(kind="voc")),
    "ade20k": dict(encoders="dinov2_s", dataset=dict(kind="ade20k")),
    "cityscapes": dict(encoders="dinov2_s", dataset=dict(kind="cityscapes")),
    "cocostuff27": dict(encoders="dinov2_s", dataset=dict(kind="cocostuff27"), probe=dict(epochs=5)),
}


def register() -> None:
    """Make groups and presets known to hydra."""
    store = ConfigStore.instance().store
    for name, members in ENCODERS.items():
        store(name=name, group="encoders", node={k: _node(EncoderConfig, v) for k, v in members.items()})
    for name, changes in PROBES.items():
        store(name=name, group="probe", node=_node(ProbeConfig, changes))
    for name, changes in EXPERIMENTS.items():
        rest = {key: value for key, value in changes.items() if key != "encoders"}
        defaults = [{"override /encoders": changes["encoders"]}, "_self_"]
        store(name=name, group="experiment", package="_global_", node={"defaults": defaults, **rest})
    quiet = [{f"override hydra/{name}": "none"} for name in ("job_logging", "hydra_logging")]
    hydra = dict(run=dict(dir="."), sweep=dict(dir=".", subdir="."), output_subdir=None, job=dict(chdir=False))
    plain = {field.name: field.default for field in dataclasses.fields(Config)}
    groups = dict(dataset=_node(DatasetConfig, {}), anyup=_node(UpsamplerConfig, {}))
    rest = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()
            if name not in ("encoders", "probe", *groups)}  # fmt: skip
    defaults = [{"encoders": "lite0"}, {"probe": "segmentation"}, *quiet, "_self_"]
    store(name=NAME, node={"defaults": defaults, **rest, **groups, "hydra": hydra})


def _node(kind: type, changes: dict[str, Any]) -> dict[str, Any]:
    values = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING} | changes
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
