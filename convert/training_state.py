"""The state of a training, weights with AdamW's moments and step, between PyTorch and a run of `train`.

PyTorch numbers the optimizer's state by the order of the model's parameters; a run keeps trees of Flax paths (see
`training_run`). Both become PyTorch's names and layout here.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anyup_core.checkpoints import formats, torch_file, unwrapping
from anyup_core.checkpoints.checkpoint import Checkpoint

OPTIMIZER_KEYS = ("optimizer_anyup", "optimizer", "optimizer_state_dict")
HYPER_PARAMETERS: Mapping[str, Any] = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-5}
"""AdamW's settings of the published recipe, for a run that does not say its own."""

FIXED = {
    **{"amsgrad": False, "maximize": False, "foreach": None, "capturable": False},
    **{"differentiable": False, "fused": None, "decoupled_weight_decay": True},
}
"""What else PyTorch keeps in a group of parameters."""

_MODULES = (
    *("image_encoder", "key_encoder", "query_encoder", "key_features_encoder"),
    *("cross_decode.cross_attn", "cross_decode", "aggregation", "rope"),
)
"""The model's parts in the order in which PyTorch counts their parameters; the table has the order within each."""

Moments = Mapping[str, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """A model in training.

    Attributes:
        checkpoint: the weights.
        step: optimizer steps taken.
        mu: PyTorch key -> first moment, like the weight; None for a weight that never got a gradient.
        nu: the second moments alike.
        hyper_parameters: `lr`, `betas`, `eps` and `weight_decay`.
        epoch: of the data; only PyTorch's trainer counts it.

    Raises:
        ValueError: if a moment is not of its weight's shape, belongs to no weight, or is there without the other.
    """

    checkpoint: Checkpoint
    step: int
    mu: Moments
    nu: Moments
    hyper_parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(HYPER_PARAMETERS))
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"The optimizer took {self.step} steps, which cannot be; give 0 or more.")
        for moments in (self.mu, self.nu):
            if set(moments) != set(self.checkpoint.tensors):
                odd = sorted(set(moments) ^ set(self.checkpoint.tensors))
                raise ValueError(f"The moments must be those of the weights; only one of the two has {', '.join(odd)}.")
        for name, weight in self.checkpoint.tensors.items():
            shapes = [None if moments[name] is None else moments[name].shape for moments in (self.mu, self.nu)]
            if shapes not in ([None, None], [weight.shape] * 2):
                raise ValueError(f"The moments of {name} have the shapes {shapes}; both must have {weight.shape}.")

    @classmethod
    def from_torch(cls, saved: Any, origin: str | Path = "the checkpoint") -> TrainingState:
        """Build from what the published trainer saves: {"anyup": state dict, "optimizer_anyup": AdamW's state, ...}.

        Raises:
            ValueError: if there is no optimizer state, or it is not that of one AdamW over all of the model's weights.
        """
        tensors, config = unwrapping.unwrap(saved, Path(origin))
        checkpoint = Checkpoint(tensors, config)
        optimizer = next((saved[key] for key in OPTIMIZER_KEYS if isinstance(saved.get(key), Mapping)), None)
        if optimizer is None:
            raise ValueError(
                f"{origin} has no optimizer state (none of {', '.join(OPTIMIZER_KEYS)}); convert its weights alone, "
                "without --training."
            )
        states, group = _parts(optimizer, origin)
        names = parameter_order(checkpoint)
        if list(group.get("params", ())) != list(range(len(names))):
            raise ValueError(f"{origin}: the optimizer must hold the model's {len(names)} weights, and no others.")
        if unknown := sorted(set(states) - set(range(len(names)))):
            raise ValueError(f"{origin}: the optimizer has the state of weight {unknown[0]}, which does not exist.")
        steps = {int(state["step"]) for state in states.values()}
        if len(steps) > 1:
            raise ValueError(
                f"{origin}: the optimizer took {', '.join(map(str, sorted(steps)))} steps for different weights; "
                "a run counts one for all."
            )
        mu, nu = (
            {name: states[index][kind] if index in states else None for index, name in enumerate(names)}
            for kind in ("exp_avg", "exp_avg_sq")
        )
        hyper = {name: group.get(name, default) for name, default in HYPER_PARAMETERS.items()}
        epoch = saved.get("epoch")
        return cls(checkpoint, steps.pop() if steps else 0, mu, nu, hyper, epoch if isinstance(epoch, int) else 0)

    def to_torch(self) -> dict[str, Any]:
        """Return what the published trainer saves, with `cfg` as a plain dict, and the step by itself."""
        names = parameter_order(self.checkpoint)
        states = {
            index: {
                "step": np.array(self.step, np.float32),
                "exp_avg": np.ascontiguousarray(self.mu[name]),
                "exp_avg_sq": np.ascontiguousarray(self.nu[name]),
            }
            for index, name in enumerate(names)
            if self.mu[name] is not None
        }
        group = {**self.hyper_parameters, **FIXED, "params": list(range(len(names)))}
        return {
            "optimizer_anyup": {"state": states, "param_groups": [group]},
            "epoch": self.epoch,
            "step": self.step,
            "cfg": {"model": dict(self.checkpoint.config)},
            "anyup": collections.OrderedDict((name, self.checkpoint.tensors[name]) for name in names),
        }

    @classmethod
    def from_run(cls, directory: str | Path) -> TrainingState:
        """Read a run's newest checkpoint, or the one of a step if `directory` is that of a step.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if it is damaged, or has no optimizer state.
            ImportError: without jax and orbax-checkpoint.
        """
        from convert import training_run

        return training_run.read(Path(directory))

    def write_run(self, directory: str | Path) -> Path:
        """Write a run that `train` resumes at this step, and return the directory.

        Raises:
            FileExistsError: if the directory is not empty.
            ImportError: without jax and orbax-checkpoint.
        """
        from convert import training_run

        return training_run.write(Path(directory), self)


def read(path: str | Path) -> TrainingState:
    """Read a .pth or .pt file as `TrainingState.from_torch` does."""
    return TrainingState.from_torch(torch_file.read(Path(path)), path)


def write(path: str | Path, state: TrainingState) -> Path:
    """Write a .pth or .pt file under a temporary name that is then renamed; an existing file is replaced."""
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as directory:
        torch_file.write(Path(directory) / path.name, state.to_torch())
        os.replace(Path(directory) / path.name, path)
    return path


def parameter_order(checkpoint: Checkpoint) -> list[str]:
    """Return the PyTorch keys in the order of the PyTorch model's `parameters()`."""

    def part(name: str) -> int:
        return next(index for index, module in enumerate(_MODULES) if name.startswith(f"{module}."))

    return sorted(checkpoint.tensors, key=part)


def _parts(optimizer: Mapping[str, Any], origin: str | Path) -> tuple[Mapping[int, Any], Mapping[str, Any]]:
    """Return the state of each weight and the one group of parameters of an AdamW."""
    match optimizer:
        case {"state": Mapping() as states, "param_groups": [Mapping() as group]}:
            pass
        case {"state": Mapping(), "param_groups": [_, _, *_] as groups}:
            raise ValueError(f"{origin}: the optimizer has {len(groups)} groups of weights; only one is understood.")
        case _:
            raise ValueError(f"{origin}: its optimizer state is not what torch.optim.AdamW.state_dict() returns.")
    if any(not isinstance(state, Mapping) or not {"step", "exp_avg", "exp_avg_sq"} <= set(state)
           for state in states.values()):  # fmt: skip
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
        state = TrainingState.from_run(source)
    elif kinds == (formats.TORCH, formats.ORBAX):
        from convert import training_run

        training_run.check_new(destination)
        state = read(source)
    else:
        raise ValueError(
            "--training converts the directory of a run to a .pth file, or a .pth file to a new directory; "
            f"{source} and {destination} are no such pair."
        )
    state = dataclasses.replace(state, checkpoint=complete(state.checkpoint))
    if kinds[1] == formats.TORCH:
        write(destination, state)
    else:
        state.write_run(destination)
    return f"{destination}: {len(state.checkpoint.tensors)} tensors, their moments and step {state.step} written"
