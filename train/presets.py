"""hydra on top of `train.config`: groups and presets, by their names on the command line."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from anyup_core.config import AnyUpConfig
from anyup_core.settings import defaults, to_dict
from train.config import Config, DatasetConfig, EncoderConfig, MeshConfig, OptimizerConfig
from train.upsamplers import FeatUpModel, JAFARModel, LoftUpModel, NAFModel

NAME = "train"  # of hydra's configuration for `train.run`

DINOV2_S, DINOV2_REG_S = "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"
ENCODERS: dict[str, dict[str, dict[str, Any]]] = {
    "dinov2_s": {"dinov2_s": dict(name=DINOV2_S)},
    "multi_backbone": {
        "dinov2_s": dict(name=DINOV2_S),
        "dinov2_reg_s": dict(name=DINOV2_REG_S),
        "clip_b": dict(name="vit_base_patch16_clip_384"),
        "siglip2_b": dict(name="vit_base_patch16_siglip_512.v2_webli"),
        "vit_b": dict(name="vit_base_patch16_224"),
    },
    "dinov3_s": {"dinov3_s": dict(name="vit_small_patch16_dinov3")},
    "dinov3_b": {"dinov3_b": dict(name="vit_base_patch16_dinov3")},
    "efficientnet_lite0": {"lite0": dict(name="efficientnet_lite0", layer=[-2])},
    "efficientnet_lite": {
        "lite0_stride16": dict(name="efficientnet_lite0", layer=[-2]),
        "lite0_stride32": dict(name="efficientnet_lite0"),
        "lite1_stride16": dict(name="efficientnet_lite1", layer=[-2]),
        "lite1_stride32": dict(name="efficientnet_lite1"),
    },
}
MODELS: dict[str, dict[str, Any]] = {"anyup": {}, "anyup_natten": dict(window="natten")}
OTHER_MODELS: dict[str, tuple[Any, dict[str, str]]] = {
    "jafar": (JAFARModel, dict(optimizer="jafar", dataset="skimage_whole")),
    "naf": (NAFModel, dict(optimizer="naf", dataset="skimage_large")),
    "featup": (FeatUpModel, dict(optimizer="featup", dataset="skimage_whole")),
    "loftup": (LoftUpModel, {}),
}
"""Other upsamplers -> their settings, and the groups that they choose unless a preset or the command line does."""
DATASETS: dict[str, dict[str, Any]] = {
    "skimage": dict(kind="skimage", crop_size=[128, 128], img_size=[64, 64], guidance_size=[64, 64], num_local_crops=4),
    "skimage_whole": dict(kind="skimage", crop_size=[128, 128], img_size=[64, 64]),
    "skimage_large": dict(kind="skimage", crop_size=[320, 320], img_size=[160, 160]),
    "folder": dict(kind="folder", root="data/imagenet/train"),
    "imagenet2012": dict(kind="tfds", name="imagenet2012"),
    "tfds": dict(kind="tfds"),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_cosine": dict(schedule="cosine", warmup_steps=1000, clip_norm=1.0),
    "adamw_fast": dict(learning_rate=2e-3),
    "jafar": {},
    "naf": {},
    "featup": dict(kind="nadam", learning_rate=1e-3, weight_decay=0.0, clip_norm=1e-4, clip_steps=10),
}
MESHES: dict[str, dict[str, Any]] = {
    "replicated": {},
    "fsdp": dict(data=1, model=-1, parameters="fsdp", encoders="fsdp"),
}
EXPERIMENTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "smoke": (
        dict(encoders="efficientnet_lite0", dataset="skimage", optimizer="adamw_fast"),
        dict(
            dtype="float32", batch_size=4, max_steps=20, checkpoint=dict(every=10),
            log=dict(every=5, pictures_every=20),
        ),
    ),
    "paper": (dict(encoders="dinov2_s", dataset="folder"), {}),
    "multi_backbone": (dict(encoders="multi_backbone", dataset="folder"), {}),
    "dinov3": (dict(encoders="dinov3_s", dataset="folder"), {}),
    "efficientnet_lite": (dict(encoders="efficientnet_lite", dataset="folder"), {}),
    "jafar": (dict(model="jafar", encoders="dinov2_s", dataset="folder", optimizer="jafar"), {}),
    "naf": (
        dict(model="naf", encoders="dinov3_b", dataset="folder", optimizer="naf"),
        dict(dataset=dict(crop_size=[512, 512], img_size=[256, 256]), max_steps=25_000),
    ),
    "featup": (
        dict(model="featup", encoders="dinov2_s", dataset="folder", optimizer="featup"),
        dict(dataset=dict(crop_size=[224, 224], img_size=[112, 112])),
    ),
}  # fmt: skip
"""Preset -> the groups it chooses, and what it changes besides output_dir=outputs/NAME. `smoke` runs by default."""

GROUPS = dict(encoders="efficientnet_lite0", dataset="skimage", optimizer="adamw", mesh="replicated", model="anyup")
"""Each group and the option that a preset takes unless it chooses another."""

QUIET = [{f"override hydra/{name}": "none"} for name in ("job_logging", "hydra_logging")]
HYDRA = dict(run=dict(dir="."), sweep=dict(dir=".", subdir="."), output_subdir=None, job=dict(chdir=False))
"""Hydra writes no files, keeps no log and does not change the folder."""


def register() -> None:
    """Register the groups and presets with hydra."""
    store = ConfigStore.instance().store
    for name, members in ENCODERS.items():
        node = {key: defaults(EncoderConfig, **fields) for key, fields in members.items()}
        store(name=name, group="encoders", node=node)
    for group, kind, options in (
        ("model", AnyUpConfig, MODELS), ("dataset", DatasetConfig, DATASETS),
        ("optimizer", OptimizerConfig, OPTIMIZERS), ("mesh", MeshConfig, MESHES),
    ):  # fmt: skip
        for name, fields in options.items():
            store(name=name, group=group, node=defaults(kind, **fields))
    for name, (kind, groups) in OTHER_MODELS.items():
        choices = [{f"override /{group}": choice} for group, choice in groups.items()]
        node = {"defaults": [*choices, "_self_"], "model": defaults(kind)}
        store(name=name, group="model", package="_global_", node=node)
    for name, (groups, changes) in EXPERIMENTS.items():
        choices = [{f"override /{group}": choice} for group, choice in (GROUPS | groups).items()]
        node = {"defaults": [*choices, "_self_"], **_others(name, changes)}
        store(name=name, group="experiment", package="_global_", node=node)
    groups, changes = EXPERIMENTS["smoke"]
    choices = [{group: choice} for group, choice in (GROUPS | groups).items()]
    store(name=NAME, node={"defaults": [*choices, *QUIET, "_self_"], **_others("smoke", changes), "hydra": HYDRA})


def _others(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return every setting outside the groups, with a preset's changes, so that no other preset's value remains."""
    plain = to_dict(Config(encoders={"none": EncoderConfig(name="none")}, output_dir=f"outputs/{name}"))
    rest = {name: value for name, value in plain.items() if name not in GROUPS}
    return OmegaConf.to_container(OmegaConf.merge(rest, changes))
