"""The checkpoints of a run of `train`: Orbax items `params`, `optimizer` and `progress` in `checkpoints/STEP/`.

The trainer adds `data` and `config`; a run written here lacks them, and takes both from the step and the command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyup_core.checkpoints import formats, key_table, run_directory
from anyup_core.checkpoints.checkpoint import Checkpoint
from convert.training_state import HYPER_PARAMETERS, TrainingState

CHECKPOINTS, ITEMS = "checkpoints", ("params", "optimizer")
_OF_RUN = {"lr": "learning_rate", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
"""AdamW's settings by PyTorch's name -> by the name in a run's configuration."""


def step_directory(directory: Path) -> Path:
    """Return the directory of the newest step of a run, or `directory` itself if it is that of a step.

    Raises:
        FileNotFoundError: if there is no checkpoint, or it has no optimizer state.
    """
    found = run_directory.step_directory(directory)
    if found is None:
        raise FileNotFoundError(
            f"{directory} is no run with a checkpoint: {directory / CHECKPOINTS} holds no directory of a step."
        )
    for item in ITEMS:
        if not (found / item).is_dir():
            raise FileNotFoundError(f"{found} has no {item}/, so no training can go on from it; choose another step.")
    return found


def read(directory: Path) -> TrainingState:
    """Read a run; see `TrainingState.from_run`."""
    path = step_directory(directory)
    optimizer = formats.read_tree(path / "optimizer")
    if set(optimizer) != {"count", "mu", "nu"}:
        raise ValueError(f"{path / 'optimizer'} holds {', '.join(optimizer)}; it must hold count, mu and nu.")
    configuration, progress = _json(path / "config"), _json(path / "progress")
    parameters = _flat(formats.read_tree(path / "params"))
    settings = configuration.get("model") or progress.get("model") or {}
    fields = {name: value for name, value in settings.items() if value is not None and name != "backend"}
    checkpoint = Checkpoint.from_flax(parameters, fields)
    mu, nu = (trained_to_torch(_flat(optimizer[name]), checkpoint, path / "optimizer") for name in ("mu", "nu"))
    return TrainingState(
        checkpoint,
        int(optimizer["count"]),
        mu,
        nu,
        _hyper_parameters(configuration, progress),
        progress.get("epoch", 0),
    )


def write(directory: Path, state: TrainingState) -> Path:
    """Write a run; see `TrainingState.write_run`."""
    check_new(directory)
    orbax = formats.orbax()
    flax = {name: array.astype(np.float32) for name, array in state.checkpoint.flax().items()}
    optimizer = {
        "count": np.array(state.step, np.int32),
        **{
            name: _nested(trained_to_flax(moments, state.checkpoint))
            for name, moments in (("mu", state.mu), ("nu", state.nu))
        },
    }
    progress = {
        "step": state.step,
        "epoch": state.epoch,
        "model": dict(state.checkpoint.config),
        "optimizer": {name: state.hyper_parameters[key] for key, name in _OF_RUN.items()},
    }
    args = orbax.args
    with orbax.CheckpointManager((directory / CHECKPOINTS).absolute()) as manager:
        manager.save(
            state.step,
            args=args.Composite(
                params=args.StandardSave(_nested(flax)),
                optimizer=args.StandardSave(optimizer),
                progress=args.JsonSave(progress),
            ),
        )
        manager.wait_until_finished()
    return directory


def check_new(directory: Path) -> None:
    """Raise FileExistsError unless a run may be written there: nothing is there, or an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is not empty and stays as it is; name a new directory for the run.")


def trained_to_flax(moments: Mapping[str, np.ndarray | None], checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return Flax path -> moment of each trained parameter; zeros where PyTorch had no gradient yet."""
    result = {}
    for entry in checkpoint.entries:
        if _is_trained(entry):
            moment = moments[entry.torch]
            moment = np.zeros(entry.torch_shape) if moment is None else moment
            result[entry.flax] = np.ascontiguousarray(entry.to_flax(moment), dtype=np.float32)
    return result


def trained_to_torch(
    moments: Mapping[str, np.ndarray], checkpoint: Checkpoint, origin: Path
) -> dict[str, np.ndarray | None]:
    """Return PyTorch key -> moment, None for what is not trained. Raises ValueError for moments of another model."""
    trained = {entry.flax: entry.flax_shape for entry in checkpoint.entries if _is_trained(entry)}
    if {name: moment.shape for name, moment in moments.items()} != trained:
        odd = sorted(name for name in {**trained, **moments} if name not in moments
                     or moments[name].shape != trained.get(name))  # fmt: skip
        raise ValueError(f"{origin} does not fit the weights: the moments of {', '.join(odd)} are missing or differ.")
    parts: dict[str, list[np.ndarray]] = {}
    for entry in checkpoint.entries:
        if _is_trained(entry):
            parts.setdefault(entry.torch, []).append(entry.op.to_torch(moments[entry.flax]))
    return {name: np.concatenate(parts[name]) if name in parts else None for name in checkpoint.tensors}


def _is_trained(entry: key_table.Entry) -> bool:
    """Whether the optimizer holds it: all but the output projection, which no output depends on in either framework."""
    return not (entry.carried and entry.part is None)


def _json(item: Path) -> dict[str, Any]:
    path = item / "metadata"  # where Orbax's JsonSave puts it
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error


def _hyper_parameters(configuration: Mapping[str, Any], progress: Mapping[str, Any]) -> dict[str, Any]:
    settings = configuration.get("optimizer") or progress.get("optimizer") or {}
    found = {key: settings.get(name, HYPER_PARAMETERS[key]) for key, name in _OF_RUN.items()}
    return found | {"betas": tuple(found["betas"])}


def _flat(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return dict(formats.flatten(tree))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, array in flat.items():
        *parents, leaf = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return nested
