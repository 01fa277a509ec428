"""Paths as users give them: the home folder, and names in either form of Unicode."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

import evaluation.config
import train.config
from anyup_core.paths import expanded, user_path
from anyup_core.settings import from_dict, to_dict
from anyup_jax.cli import main
from anyup_jax.encoders.settings import EncoderConfig

FORMS = [("NFC", "NFD"), ("NFD", "NFC")]
NAME = "Fotos é/Ångström"


@pytest.mark.parametrize(("given", "there"), FORMS)
def test_a_name_in_the_other_form_of_unicode_is_found(given: str, there: str, tmp_path: Path) -> None:
    folder = tmp_path / unicodedata.normalize(there, NAME)
    folder.mkdir(parents=True)
    path = tmp_path / unicodedata.normalize(given, NAME)
    assert user_path(path) == folder
    assert user_path(path / "é.npy").parent == folder  # a file that is yet to be written
    path.mkdir(parents=True)
    assert user_path(path) == path  # the name itself goes before others


@pytest.mark.parametrize("text", ["anyup", "gs://bucket/é", "~nobody-of-this-name/x", "é/b", "/é", "a/../b", "x\udcff"])
def test_what_is_not_there_stays(text: str) -> None:
    assert expanded(text) == text


def test_every_setting_that_is_a_path_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    encoders = dict(e=dict(name="resnet50", weights="~/w"))
    data = dict(kind="folder", root="~/r", index="~/i")
    values = dict(dataset=data, checkpoint=dict(init_from="~/c"), log=dict(pictures_root="~/p"), output_dir="~/o")
    config = from_dict(train.config.Config, values | dict(encoders=encoders))
    assert paths(config) == {f"{tmp_path}/{name}" for name in "wricpo"}
    values = dict(dataset=dict(root="~/r"), anyup=dict(weights="~/a"), cache="~/c", output_dir="~/o")
    config = from_dict(evaluation.config.Config, values | dict(encoders=encoders))
    assert paths(config) == {f"{tmp_path}/{name}" for name in "wraco"}
    assert isinstance(config.encoders["e"], EncoderConfig)


def paths(config: object) -> set[str]:
    """Return all values that are in the home folder, or would be."""

    def values(tree: object) -> set[str]:
        if isinstance(tree, dict):
            return set().union(*map(values, tree.values()))
        return {tree} if isinstance(tree, str) and tree.startswith(("~", "/")) else set()

    return values(to_dict(config))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "anyup_efficientnet_lite", "~/out.pth"]) == 0
    assert main(["inspect", "~/out.pth"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]
