"""A run of `train` as a checkpoint: its newest step, and what of it is the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHECKPOINTS, PARAMS, EMA = "checkpoints", "params", "ema"


def step_directory(path: Path) -> Path | None:
    """Return the newest complete step of a run, of its folder `checkpoints`, or the step that `path` itself is.

    None for anything else. Orbax gives a folder the number of its step once everything is written.
    """
    if _is_step(path):
        return path
    for parent in (path / CHECKPOINTS, path):
        steps = [x for x in (parent.iterdir() if parent.is_dir() else ()) if x.name.isdecimal() and _is_step(x)]
        if steps:
            return max(steps, key=lambda x: int(x.name))
    return None


def config(step: Path) -> dict[str, Any]:
    """Return the fields of `AnyUpConfig` that the run says; where the computation runs is not part of them."""
    model = recorded(step, "model") or {}
    if not isinstance(model, dict):
        raise ValueError(f"The configuration of the run in {step} says model={model!r}; it must be a JSON object.")
    return {name: value for name, value in model.items() if name != "backend"}


def recorded(step: Path, name: str) -> Any:
    """Return an entry of the run's configuration, or else of its progress; None without one."""
    records = (step / item / "metadata" for item in ("config", "progress"))  # where Orbax's JsonSave puts them
    return next(
        (x for path in records if path.is_file() and (x := parse_json(path.read_bytes(), str(path)).get(name))), None
    )


def parse_json(text: str | bytes, origin: str) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for anything else; the message calls it `origin`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{origin} holds a {type(content).__name__}; it must be a JSON object.")
    return content


def _is_step(path: Path) -> bool:
    return (path / PARAMS).is_dir() and (path / "progress" / "metadata").is_file()
