"""The folder of a model on the Hugging Face hub: `config.json`, `model.safetensors` and a model card.

Both frameworks read it: the tensors have PyTorch's names and layout, and the configuration holds the fields of
`AnyUpConfig`, but for `backend`, and `model_type`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyup_core.checkpoints import run_directory

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
MODEL_TYPE = "anyup"


def is_hub_folder(path: Path) -> bool:
    return (path / WEIGHTS).is_file() and not (path / run_directory.PARAMS).is_dir()


def holds_nothing_else(path: Path) -> bool:
    """Return whether a directory is empty, or holds such a folder and no other files."""
    names = {item.name for item in path.iterdir()}
    return not names or (is_hub_folder(path) and names <= {CONFIG, WEIGHTS, CARD})


def describes_anyup(path: Path) -> bool:
    """Return whether a directory has a `config.json` that says it is AnyUp's."""
    file = path / CONFIG
    return file.is_file() and run_directory.parse_json(file.read_bytes(), str(file)).get("model_type") == MODEL_TYPE


def read_config(path: Path) -> dict[str, Any]:
    """Return fields of `AnyUpConfig`; their values are not checked. Raises ValueError if another model is described."""
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"{path} has no {CONFIG}; give the path of {file.with_name(WEIGHTS)} to load it without.")
    fields = run_directory.parse_json(file.read_bytes(), str(file))
    kind = fields.pop("model_type", MODEL_TYPE)
    if kind != MODEL_TYPE:
        raise ValueError(f"{file} describes a model of type {str(kind)[:80]!r}, not {MODEL_TYPE!r}.")
    return _without_backend(fields)


def config_text(config: Mapping[str, Any]) -> str:
    """Return what `config.json` holds."""
    return json.dumps({"model_type": MODEL_TYPE, **_without_backend(config)}, indent=2) + "\n"


def _without_backend(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out how attention is computed: it is the machine's matter and never changes the result."""
    return {name: value for name, value in config.items() if name != "backend"}
