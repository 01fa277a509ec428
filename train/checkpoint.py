"""Checkpoints of a run, on Orbax: written in the background, checked when read; the newest good one counts.

A checkpoint has the items `params`, `optimizer`, `ema` (if the run keeps one), `data` (the position in the data),
`config`, and `progress` (the step, a digest of every array, and a digest of the other items and of itself).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from anyup_core import settings
from train.state import Trees

DAMAGE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)
"""What Orbax and TensorStore raise for files that are missing or cannot be decoded; other errors are not the files'."""
DAMAGED = "damaged"  # the folder, beside `checkpoints`, that damaged checkpoints are moved to


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps done.
        trees: the arrays of `params`, `optimizer` and `ema`, of those that were asked for.
        data, config: position in the data and configuration; None where there is none, as from `convert`.
    """

    step: int
    trees: Trees
    data: dict[str, Any] | None
    config: dict[str, Any] | None


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        directory: the folder; created if it does not exist. What an interrupted save left there is removed.
        keep: how many of the newest checkpoints are kept.
        keep_period: checkpoints whose step is a multiple of it are never removed; None to keep only the newest.
    """

    def __init__(self, directory: Path, keep: int, keep_period: int | None = None):
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_period, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options)
        self.saving: int | None = None

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint; the newest may still be being written."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, trees: Trees, data: dict[str, Any], config: dict[str, Any]) -> None:
        """Start writing a checkpoint in the background; the arrays may be overwritten once this returns.

        Args:
            step: optimizer steps done.
            trees: nested dictionaries of arrays: `params`, `optimizer` and `ema`; None for those that the run lacks.
            data, config: JSON values.

        Raises:
            OSError: if this checkpoint or the one before it could not be written.
        """
        trees = {name: tree for name, tree in trees.items() if tree is not None}
        arrays = {name: digests(tree) for name, tree in trees.items()}
        progress = dict(step=step, digests=arrays, items=[*trees, "data", "config"])
        progress["records"] = record_digest(data, config, progress)
        records = dict(data=data, config=config, progress=progress)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        with self._save_errors():
            self.manager.wait_until_finished()
            self.saving = step
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Wait until everything is written. Raises OSError if it could not be."""
        with self._save_errors():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait until everything is written, and release the manager."""
        try:
            self.wait()
        finally:
            self.manager.close()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Turn whatever a failed save raises into one OSError, and remove what it wrote, which may fill the disk."""
        try:
            yield
        except Exception as error:
            for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            step, self.saving = self.saving, None
            # only a checkpoint that was written to the end gets a folder called by its number
            complete = (int(path.name) for path in self.directory.glob("*") if path.name.isdecimal() and path.is_dir())
            kept = max((number for number in complete if number != step), default=None)
            intact = "there is none before it" if kept is None else f"that of step {kept} is intact"
            raise OSError(
                f"The checkpoint of step {step} could not be written ({_shortened(error)}); {intact}. Make room, then "
                "run the same command."
            ) from error

    def restore(self, template: Trees, say: Callable[[str], None] = print) -> Restored | None:
        """Return the newest good checkpoint, None if there is none. Damaged ones are moved away.

        Args:
            template: nested dictionaries of arrays with the shapes, types and shardings that the arrays are to have;
                the shardings need not be those they were saved with. None for an item that is not wanted.
            say: prints a line, about each damaged checkpoint.

        Raises:
            AnotherModel: if the newest checkpoint is of a model of other shapes.
            ValueError: if there are checkpoints, but all are damaged.
        """
        self.wait()
        wanted = {name: tree for name, tree in template.items() if tree is not None}
        steps = self.steps()
        for number, step in reversed(list(enumerate(steps))):
            restored, fault = self._attempt(step, wanted)
            if restored is not None:
                return restored
            then = f"going back to step {steps[number - 1]}" if number else "there is none before it"
            moved = self._set_aside(step)
            say(f"The checkpoint of step {step} is damaged ({fault}) and was moved to {moved}; {then}.")
        if steps:
            raise ValueError(
                f"All checkpoints in {self.directory} were damaged and are in {self.directory.parent / DAMAGED}; start "
                "anew in another output_dir."
            )
        return None

    def _attempt(self, step: int, wanted: Trees) -> tuple[Restored | None, str]:
        """Return a checkpoint, or None and what is wrong with it; all processes come to the same verdict."""
        restored, fault = None, ""
        try:
            restored, expected = self._read(step, wanted)
        except Exception as error:
            cause = error.__cause__ if type(error) is Exception else error  # Orbax wraps errors of TensorStore
            if isinstance(error, AnotherModel) or not isinstance(cause, DAMAGE):
                raise
            fault = _shortened(cause)
        if not multihost_utils.process_allgather(np.array(restored is not None)).all():
            return None, fault or "another process could not read it"
        for name in set(wanted) & set(expected) if restored else ():
            if digests(restored.trees[name]) != expected[name]:
                return None, f"the numbers of {name} are not those that were saved"
        return restored, fault

    def _read(self, step: int, wanted: Trees) -> tuple[Restored, dict[str, Any]]:
        """Return what a checkpoint holds, and the digests its arrays should have."""
        folder = self.directory / str(step)
        progress = json.loads((folder / "progress" / "metadata").read_text())
        for name in progress.get("items", ()):
            if not (folder / name).is_dir():
                raise ValueError(f"{name} is missing")
        trees: Trees = {}
        for name, tree in wanted.items():
            if name == "ema" and not (folder / name).is_dir():  # the run kept none until now
                trees[name] = jax.tree.map(jnp.copy, trees["params"])
                continue
            with ocp.PyTreeCheckpointer() as reader:
                metadata = reader.metadata(folder / name).item_metadata
                if metadata is None:
                    raise ValueError(f"{name} is missing")
                check_shapes(metadata.tree, tree, folder / name)
                arguments = ocp.checkpoint_utils.construct_restore_args(tree)
                trees[name] = reader.restore(folder / name, item=tree, restore_args=arguments)
        records = (folder / name / "metadata" for name in ("data", "config"))
        data, config = (json.loads(path.read_text()) if path.is_file() else None for path in records)
        if "records" in progress and progress["records"] != record_digest(data, config, progress):
            raise ValueError("data, config or progress is not what was saved")
        # checkpoints from before these digests, and those of `convert`, have none; only their steps are compared
        for name, record in (("progress", progress), ("data", data)):
            if record is not None and record["step"] != step:
                raise ValueError(f"{name} is of step {record['step']}")
        return Restored(step, trees, data, config), progress.get("digests", {})

    def _set_aside(self, step: int) -> Path:
        """Move a damaged checkpoint away, and return where it is now."""
        target = self.directory.parent / DAMAGED / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "_again")
            (self.directory / str(step)).rename(target)
        multihost_utils.sync_global_devices(f"damaged {step}")
        self.manager.reload()
        return target


class AnotherModel(ValueError):
    """The checkpoint is good, but of a model of other shapes."""


def check_shapes(saved: Any, expected: Any, where: Path) -> None:
    """Raise AnotherModel unless two trees have the same names and shapes."""
    shapes = (jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (saved, expected))
    if differing := [text for _, text in sorted(settings.changes(*shapes).items())]:
        shown = "; ".join(differing[:4])
        raise AnotherModel(
            f"{where} is of another model than the one configured ({shown}{'; ...' if differing[4:] else ''}); give "
            "the settings it was trained with, or another output_dir."
        )


def record_digest(data: Any, config: Any, progress: dict[str, Any]) -> str:
    """Return a digest of the position in the data, the configuration, and the progress without this digest."""
    others = {name: value for name, value in progress.items() if name != "records"}
    return hashlib.sha256(json.dumps([data, config, others], sort_keys=True).encode()).hexdigest()


def digests(tree: Any) -> dict[str, int]:
    """Return a 32-bit digest of every array by its name with dots, whatever its sharding.

    It is the sum of the array's 32-bit words, each mixed with its position.
    """
    return {name: int(x) for name, x in jax.device_get(_digests(settings.flat(tree))).items()}


@jax.jit
def _digests(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    def digest(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        mixed = bits + jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)

    return {name: digest(x) for name, x in arrays.items()}


def _shortened(error: BaseException) -> str:
    """Return an error in at most 240 characters: its beginning, and its end, where the cause is."""
    text = " ".join(str(error).partition("[source locations")[0].split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"
