"""The configuration: presets, groups, types, and values that are refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from anyup_core.settings import from_dict, to_dict
from tests.training import configured
from train import presets
from train.config import Config, EncoderConfig, FeaturesConfig, ProfileConfig, differences
from train.output_dir import check_output


@pytest.mark.parametrize("name", presets.EXPERIMENTS)
def test_every_preset_is_a_run(name: str) -> None:
    config = configured(f"+experiment={name}")
    assert from_dict(Config, to_dict(config)) == config
    assert differences(to_dict(config), to_dict(config)) == []


def test_smoke_is_the_default() -> None:
    assert configured() == configured("+experiment=smoke")


def test_the_published_recipe() -> None:
    config = configured("+experiment=paper")
    assert (config.batch_size, config.max_steps, config.dtype) == (4, 100_000, "bfloat16")
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-4, 1e-5)
    assert (config.optimizer.betas, config.optimizer.schedule) == ((0.9, 0.999), "constant")
    assert (config.dataset.crop_size, config.dataset.img_size) == ((448, 448), (224, 224))
    assert config.dataset.num_local_crops == 4
    assert (config.loss.reconstruction, config.loss.consistency, config.loss.input) == (1, 0.1, 0.1)
    assert [encoder.name for encoder in config.encoders.values()] == ["vit_small_patch14_dinov2.lvd142m"]
    assert len(configured("+experiment=multi_backbone").encoders) == 5


def test_the_command_line_has_the_last_word() -> None:
    config = configured("+experiment=paper", "model.window_ratio=0.05", "optimizer=adamw_cosine", "mesh=fsdp", "seed=7")
    assert config.model.window_ratio == 0.05
    assert (config.optimizer.schedule, config.optimizer.learning_rate) == ("cosine", 2e-4)
    assert (config.mesh.parameters, config.seed) == ("fsdp", 7)
    assert configured("dataset.crop_size=[64,96]", "dataset.img_size=32").dataset.crop_size == (64, 96)
    assert configured("dataset.img_size=32").dataset.img_size == (32, 32)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.learning_rate=-1", "optimizer.learning_rate=-1.0"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast'"),
        ("optimizer.schedule=linear", "optimizer.schedule='linear'"),
        ("batch_size=1.5", "batch_size=1.5"),
        ("batch_size=0", "batch_size=0"),
        (f"batch_size={10**30}", f"batch_size={10**30}"),
        (f"max_steps={10**30}", f"max_steps={10**30}"),
        (f"dataset.num_local_crops={10**30}", f"dataset.num_local_crops={10**30}"),
        (f"dataset.crop_size={10**30}", f"dataset.crop_size=({10**30}, {10**30})"),
        (f"seed={10**30}", f"seed={10**30}"),
        ("dataset.img_size=[1,2,3]", "dataset.img_size=[1, 2, 3]"),
        ("dataset.img_size=900", "dataset.img_size=(900, 900)"),
        ("dataset.kind=folder", "dataset.root=None"),
        ("dataset.workers=-1", "dataset.workers=-1"),
        ("dataset.global_view_random_resize=[0.9,0.5]", "dataset.global_view_random_resize=(0.9, 0.5)"),
        ("features.shares=[1,0]", "features.shares=(1.0, 0.0)"),
        ("features.shares=[]", "features.shares=()"),
        ("mesh.process_id=1", "mesh.process_id"),
        ("mesh.model=-1", "mesh.model=-1"),
        ("profile.steps=9:1", "profile.steps='9:1'"),
        ("model.window=square", "window='square'"),
        ("optimizer.accumulate=3", "optimizer.accumulate=3"),
        ("optimizer.warmup_steps=1000", "optimizer.warmup_steps=1000"),
        ("checkpoint.keep_period=0", "checkpoint.keep_period=0"),
        ("log.pictures=0", "log.pictures=0"),
        ("log.pictures=99999999999999999999", "log.pictures=9"),
        ("dataset.workers=2000000000", "dataset.workers=2000000000"),
        ("dataset.threads=2000000000", "dataset.threads=2000000000"),
        ("batch_size=1000000000000000000000000000000", "batch_size=1"),
        ("+model.depth=3", "model.depth"),
    ],
)
def test_an_impossible_setting_is_named_with_its_value(override: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        configured(override)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ValueError, match="encoders"):
        from_dict(Config, {})
    with pytest.raises(ValueError, match=r"encoders\.x\.name"):
        from_dict(Config, dict(encoders=dict(x={})))


def test_differences_leave_out_how_it_is_computed() -> None:
    old = to_dict(Config(encoders={"x": EncoderConfig(name="a")}))
    new = old | dict(max_steps=9, output_dir="b", batch_size=8, mesh=old["mesh"] | dict(model=2))
    assert differences(old, new) == ["batch_size: 4 -> 8"]


def test_a_run_from_before_a_setting_was_there_had_its_default(tmp_path: Path) -> None:
    config = Config(encoders={"x": EncoderConfig(name="a")})
    saved = to_dict(config)
    del saved["features"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    check_output(tmp_path, config)
    changed = dataclasses.replace(config, features=FeaturesConfig(shuffle=True))
    with pytest.raises(ValueError, match=r"features\.shuffle: False -> True"):
        check_output(tmp_path, changed)


def test_profile_range() -> None:
    assert ProfileConfig(steps="10:15").range() == configured("profile.steps=10:15").profile.range() == (10, 15)
