"""The state of a training, weights with AdamW's moments and step, between PyTorch and a run of `train`.

PyTorch numbers the optimizer's state by the order of the model's parameters, which is that of the key table. A run
keeps trees of Flax paths: the Orbax items `params`, `optimizer` and `progress` in `checkpoints/STEP/`. The trainer adds
`data` and `config`; a run written here lacks them, and takes both from the step and the command. Both become PyTorch's
names and layout here.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyup_core.checkpoints import formats, orbax_directory, run_directory, torch_file, unwrapping
from anyup_core.checkpoints.checkpoint import Checkpoint, to_flax, to_torch
from anyup_core.encoders.rows import Row
from anyup_core.replacement import replacing
from anyup_core.settings import require
from anyup_core.upsamplers.checkpoint import KEY as UPSAMPLER

OPTIMIZER_KEYS = ("optimizer_anyup", "optimizer", "optimizer_state_dict")
HYPER_PARAMETERS: Mapping[str, Any] = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-5}
"""AdamW's settings of the published recipe, for a run that does not say its own."""

_OF_RUN = {"lr": "learning_rate", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
"""AdamW's settings by PyTorch's name -> by the name in a run's configuration."""

FIXED = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}
FIXED |= {"fused": None, "decoupled_weight_decay": True}
"""What else PyTorch keeps in a group of parameters."""


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """A model in training.

    Attributes:
        checkpoint: the weights.
        step: optimizer steps taken.
        mu: PyTorch key -> first moment, like the weight; nothing for a weight that never got a gradient.
        nu: the second moments alike.
        hyper_parameters: `lr`, `betas`, `eps` and `weight_decay`.
        epoch: of the data; only PyTorch's trainer counts it.

    Raises:
        ValueError: if a moment is not of its weight's shape, belongs to no weight, or is there without the other.
    """

    checkpoint: Checkpoint
    step: int
    mu: Mapping[str, np.ndarray]
    nu: Mapping[str, np.ndarray]
    hyper_parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(HYPER_PARAMETERS))
    epoch: int = 0

    def __post_init__(self) -> None:
        require(self.step >= 0, "step", self.step, "the optimizer takes 0 steps or more")
        shapes = {name: weight.shape for name, weight in self.checkpoint.tensors.items()}
        for name in sorted({*self.mu, *self.nu}):
            moment_shapes = [moments[name].shape if name in moments else None for moments in (self.mu, self.nu)]
            if moment_shapes != [shapes.get(name)] * 2:
                raise ValueError(
                    f"The moments of {name} have the shapes {moment_shapes}; both must have that of the weight, "
                    f"{shapes.get(name, 'which does not exist')}."
                )

    @classmethod
    def from_torch(cls, saved: Any, origin: str | Path = "the checkpoint") -> TrainingState:
        """Build from what the published trainer saves: {"anyup": state dict, "optimizer_anyup": AdamW's state, ...}.

        Raises:
            ValueError: if there is no optimizer state, or it is not that of one AdamW over all of the model's weights.
        """
        tensors, config = unwrapping.unwrap(saved, Path(origin), averages=False)
        checkpoint = Checkpoint(tensors, config)
        names = list(checkpoint.tensors)
        optimizer = next((saved[key] for key in OPTIMIZER_KEYS if isinstance(saved.get(key), Mapping)), None)
        states, group = _states_and_group(optimizer, origin)
        if list(group.get("params", ())) != list(range(len(names))):
            raise ValueError(f"{origin}: the optimizer must hold the model's {len(names)} weights, and no others.")
        if unknown := sorted(set(states) - set(range(len(names)))):
            raise ValueError(f"{origin}: the optimizer has the state of weight {unknown[0]}, which does not exist.")
        steps = sorted({int(state["step"]) for state in states.values()}) or [0]
        if len(steps) > 1:
            raise ValueError(
                f"{origin}: the optimizer took {', '.join(map(str, steps))} steps for different weights; "
                "a run counts one for all."
            )
        mu, nu = ({names[i]: state[kind] for i, state in states.items()} for kind in ("exp_avg", "exp_avg_sq"))
        hyper = {name: group.get(name, default) for name, default in HYPER_PARAMETERS.items()}
        epoch = saved.get("epoch")
        return cls(checkpoint, steps[0], mu, nu, hyper, epoch if isinstance(epoch, int) else 0)

    def to_torch(self) -> dict[str, Any]:
        """Return what the published trainer saves, with `cfg` as a plain dict, and the step by itself."""
        states = {
            index: {
                "step": np.array(self.step, np.float32),
                "exp_avg": np.ascontiguousarray(self.mu[name]),
                "exp_avg_sq": np.ascontiguousarray(self.nu[name]),
            }
            for index, name in enumerate(self.checkpoint.tensors)
            if name in self.mu
        }
        group = {**self.hyper_parameters, **FIXED, "params": list(range(len(self.checkpoint.tensors)))}
        return {
            "optimizer_anyup": {"state": states, "param_groups": [group]},
            "epoch": self.epoch,
            "step": self.step,
            "cfg": {"model": dict(self.checkpoint.config)},
            "anyup": collections.OrderedDict(self.checkpoint.tensors),
        }

    @classmethod
    def from_run(cls, directory: str | Path) -> TrainingState:
        """Read a run's newest checkpoint, or the one of a step if `directory` is that of a step.

        Raises:
            FileNotFoundError: if there is no checkpoint, or it has no optimizer state.
            ValueError: if it is damaged or of another upsampler, or its optimizer is not AdamW's of these weights.
        """
        step = run_directory.step_directory(Path(directory))
        if step is None:
            expected = Path(directory) / run_directory.CHECKPOINTS
            raise FileNotFoundError(f"{directory} is no run with a checkpoint: {expected} has no directory of a step.")
        if not (step / "optimizer").is_dir():
            raise FileNotFoundError(f"{step} has no optimizer/, so no training can go on from it; choose another step.")
        if method := run_directory.config(step).get(UPSAMPLER):
            option = f"convert its weights alone, with --upsampler {method} and without --training"
            raise ValueError(
                f"{directory} is a run of {method}, and the published trainer's file is AnyUp's; {option}."
            )
        kind = (run_directory.recorded(step, "optimizer") or {}).get("kind", "adamw")
        require(kind == "adamw", "optimizer.kind", kind, "convert the weights alone, without --training")
        optimizer = orbax_directory.read_tree(step / "optimizer")
        trees: dict[str, dict[str, np.ndarray]] = {"count": {}, "mu": {}, "nu": {}}
        for path, array in optimizer.items():
            item, _, name = path.partition(".")
            trees.setdefault(item, {})[name] = array
        if len(trees) > 3 or not all(trees.values()):
            raise ValueError(f"{step / 'optimizer'} holds {', '.join(trees)}; it must hold count, mu and nu.")
        params = orbax_directory.read_tree(step / run_directory.PARAMS)
        checkpoint = Checkpoint.from_flax(params, run_directory.config(step))
        mu, nu = (trained_to_torch(trees[name], checkpoint, step / "optimizer") for name in ("mu", "nu"))
        settings = run_directory.recorded(step, "optimizer") or {}
        hyper = {key: settings.get(name, HYPER_PARAMETERS[key]) for key, name in _OF_RUN.items()}
        hyper["betas"] = tuple(hyper["betas"])
        return cls(checkpoint, int(optimizer["count"]), mu, nu, hyper, run_directory.recorded(step, "epoch") or 0)

    def write_run(self, directory: str | Path) -> Path:
        """Write a run that `train` resumes at this step, and return the directory.

        Raises:
            FileExistsError: if the directory is not empty.
            OSError: if it cannot be written.
        """
        directory = Path(directory)
        check_new(directory)
        params = {name: array.astype(np.float32) for name, array in self.checkpoint.flax().items()}
        optimizer = {"count": np.array(self.step, np.int32)}
        for item, moments in (("mu", self.mu), ("nu", self.nu)):
            optimizer |= {f"{item}.{path}": x for path, x in trained_to_flax(moments, self.checkpoint).items()}
        progress = {
            "step": self.step,
            "epoch": self.epoch,
            "model": dict(self.checkpoint.config),
            "optimizer": {name: self.hyper_parameters[key] for key, name in _OF_RUN.items()},
        }
        directory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(directory) as temporary:
            step = temporary / run_directory.CHECKPOINTS / str(self.step)
            step.mkdir(parents=True)
            orbax_directory.write_tree(step / "params", params)
            orbax_directory.write_tree(step / "optimizer", optimizer)
            (step / "progress").mkdir()
            (step / "progress" / "metadata").write_text(json.dumps(progress))  # as Orbax's JsonSave does
            handlers = dict.fromkeys(("params", "optimizer"), orbax_directory.STANDARD)
            orbax_directory.write_checkpoint_metadata(step, handlers | {"progress": orbax_directory.RECORD})
        return directory


def read(path: str | Path) -> TrainingState:
    """Read a .pth or .pt file as `TrainingState.from_torch` does."""
    return TrainingState.from_torch(torch_file.read(Path(path)), path)


def write(path: str | Path, state: TrainingState) -> Path:
    """Write a .pth or .pt file; an existing file is replaced once the new one is complete."""
    path = Path(path)
    with replacing(path) as temporary:
        torch_file.write(temporary, state.to_torch())
    return path


def _states_and_group(
    optimizer: Mapping[str, Any] | None, origin: str | Path
) -> tuple[Mapping[int, Any], Mapping[str, Any]]:
    """Return the state of each weight and the one group of parameters of an AdamW."""
    match optimizer:
        case {"state": Mapping() as states, "param_groups": [Mapping() as group]}:
            pass
        case {"state": Mapping(), "param_groups": [_, _, *_] as groups}:
            raise ValueError(f"{origin}: the optimizer has {len(groups)} groups of weights; only one is understood.")
        case None:
            raise ValueError(
                f"{origin} has no optimizer state (none of {', '.join(OPTIMIZER_KEYS)}); convert its weights alone, "
                "without --training."
            )
        case _:
            raise ValueError(f"{origin}: its optimizer state is not what torch.optim.AdamW.state_dict() returns.")
    if any(not (isinstance(x, Mapping) and {"step", "exp_avg", "exp_avg_sq"} <= set(x)) for x in states.values()):
        raise ValueError(f"{origin}: its optimizer is not AdamW, which keeps step, exp_avg and exp_avg_sq.")
    if group.get("amsgrad") or group.get("maximize") or not group.get("decoupled_weight_decay", True):
        raise ValueError(f"{origin}: a run has plain AdamW only, without amsgrad and maximize, with decoupled decay.")
    return states, group


def convert(source: Path, destination: Path, overwrite: bool, complete: Callable[[Checkpoint], Checkpoint]) -> str:
    """Convert a run of `train` to a .pth file of PyTorch's trainer, or the other way round.

    Args:
        source: a run, or a .pth file.
        destination: a .pth file, or a directory that does not exist.
        overwrite: whether a .pth file may be replaced.
        complete: returns a checkpoint with its configuration completed.

    Returns:
        A line that says what was written.

    Raises:
        FileNotFoundError: if there is no source.
        FileExistsError: if something is at the destination.
        ValueError: for any other pair of formats.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist.")
    kinds = formats.format_of(source), formats.format_of(destination)
    if kinds == (formats.ORBAX, formats.TORCH):
        formats.check_destination(destination, overwrite=overwrite)
    elif kinds == (formats.TORCH, formats.ORBAX):
        check_new(destination)
    else:
        raise ValueError(
            "--training converts the directory of a run to a .pth file, or a .pth file to a new directory; "
            f"{source} and {destination} are no such pair."
        )
    state = TrainingState.from_run(source) if kinds[0] == formats.ORBAX else read(source)
    state = dataclasses.replace(state, checkpoint=complete(state.checkpoint))
    if kinds[1] == formats.TORCH:
        write(destination, state)
    else:
        state.write_run(destination)
    return f"{destination}: {len(state.checkpoint.tensors)} tensors, their moments and step {state.step} written"


def check_new(directory: Path) -> None:
    """Raise FileExistsError unless a run may be written there: nothing is there, or an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is not empty and stays as it is; name a new directory for the run.")


def trained_to_flax(moments: Mapping[str, np.ndarray], checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return Flax path -> moment of each trained parameter; zeros where PyTorch had no gradient yet."""
    complete = {name: moments.get(name, np.zeros(weight.shape)) for name, weight in checkpoint.tensors.items()}
    return {path: x.astype(np.float32) for path, x in to_flax(trained(checkpoint), complete).items()}


def trained_to_torch(
    moments: Mapping[str, np.ndarray], checkpoint: Checkpoint, origin: str | Path
) -> dict[str, np.ndarray]:
    """Return PyTorch key -> moment of each trained weight. Raises ValueError for moments of another model."""
    return to_torch(f"the moments of its weights in {origin}", trained(checkpoint), moments)


def trained(checkpoint: Checkpoint) -> list[Row]:
    """Return the rows that the optimizer holds: all but the output projection, which no output depends on."""
    return [row for row in checkpoint.rows if row.part is not None or not row.unused]
