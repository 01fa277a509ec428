"""Checkpoints of a run on Orbax: written in the background, checked when they are read, the newest good one wins.

A checkpoint has the items `params`, `optimizer`, `ema` (where there is one), `data` (the position in it), `config` and
`progress` (the step and a digest of every array).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

ARRAYS = ("params", "optimizer", "ema")
RECORDS = ("data", "config", "progress")
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError)
"""What Orbax and TensorStore raise for what is missing or cannot be decoded; anything else is not the file's fault."""
DAMAGED = "damaged"  # the folder, beside `checkpoints`, that damaged ones are moved to


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held; `data` and `config` are None where it had none, as those that `convert` writes."""

    step: int
    params: dict[str, Any]
    optimizer: dict[str, Any]
    ema: dict[str, Any] | None
    data: dict[str, Any] | None
    config: dict[str, Any] | None


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        directory: the folder; made if it does not exist. What an interrupted save left there is removed.
        keep: newest checkpoints that stay.
        keep_period: multiples of it stay for ever; None for none.
    """

    def __init__(self, directory: Path, keep: int, keep_period: int | None = None):
        self.directory = Path(directory).absolute()
        self.options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_period, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.saving: int | None = None
        self._open()

    def _open(self) -> None:
        self.manager = ocp.CheckpointManager(self.directory, options=self.options, item_names=ARRAYS + RECORDS)

    def steps(self) -> list[int]:
        """Return the steps there are checkpoints of; the newest may still be being written."""
        return sorted(self.manager.all_steps())

    def save(
        self,
        step: int,
        params: dict[str, Any],
        optimizer: dict[str, Any],
        ema: dict[str, Any] | None,
        data: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        """Begin to write a checkpoint; the arrays may be overwritten when this returns.

        Raises:
            OSError: if it, or the one before, could not be written.
        """
        trees = dict(params=params, optimizer=optimizer) | ({} if ema is None else dict(ema=ema))
        progress = dict(step=step, digests={name: digests(tree) for name, tree in trees.items()})
        progress["items"] = [*trees, "data", "config"]
        records = dict(data=data, config=config, progress=progress)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        with self._failures():
            self.manager.wait_until_finished()
            self.saving = step
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Wait until everything is written. Raises OSError if it could not be."""
        with self._failures():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and give everything back."""
        try:
            self.wait()
        finally:
            self.manager.close()

    def _failures(self) -> _Failures:
        return _Failures(self)

    def restore(self, template: Mapping[str, Any], say: Callable[[str], None] = print) -> Restored | None:
        """Return the newest good checkpoint, None if there is none; `say` hears of damaged ones, which are moved away.

        Args:
            template: arrays or shapes with shardings, for each of params, optimizer and ema (or None): how to place
                them, which need not be how they were.

        Raises:
            ValueError: if there are checkpoints, but all are damaged, or the newest is of another model.
        """
        self.wait()
        wanted = {name: _structs(tree) for name, tree in template.items() if tree is not None}
        steps = self.steps()
        for step in reversed(steps):
            found, fault = self._attempt(step, wanted)
            if found is not None:
                return found
            before = [other for other in steps if other < step]
            then = f"going back to step {before[-1]}" if before else "there is none before it"
            moved = self._set_aside(step)
            say(f"The checkpoint of step {step} is damaged ({fault}) and was moved to {moved}; {then}.")
        if steps:
            raise ValueError(
                f"All checkpoints in {self.directory} were damaged and are in {self.directory.parent / DAMAGED}; start "
                "anew in another output_dir."
            )
        return None

    def _attempt(self, step: int, wanted: Mapping[str, Any]) -> tuple[Restored | None, str]:
        """Return a checkpoint, or what is wrong with it; all processes come to the same verdict."""
        found, fault = None, ""
        try:
            found, expected = self._read(step, wanted)
        except Exception as error:
            cause = error.__cause__ if type(error) is Exception else error  # as Orbax wraps what TensorStore says
            if isinstance(error, AnotherModel) or not isinstance(cause, DAMAGE):
                raise
            fault = _shortened(cause)
        if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(found is not None)).all():
            return None, fault or "as another process found"
        if found is None:
            return None, fault
        for name in set(wanted) & set(expected):
            if digests(getattr(found, name)) != expected[name]:
                return None, f"the numbers of {name} are not those that were saved"
        return found, ""

    def _read(self, step: int, wanted: Mapping[str, Any]) -> tuple[Restored, dict[str, Any]]:
        """Return what a checkpoint holds, and the digests it should have."""
        folder = self.directory / str(step)
        progress = json.loads((folder / "progress" / "metadata").read_text())
        for name in progress.get("items", ()):
            if not (folder / name).is_dir():
                raise ValueError(f"{name} is missing")
        trees: dict[str, Any] = dict.fromkeys(ARRAYS)
        for name in wanted:
            if name == "ema" and not (folder / name).is_dir():  # of a run that kept none so far
                trees[name] = jax.tree.map(jnp.copy, trees["params"])
                continue
            with ocp.PyTreeCheckpointer() as reader:
                metadata = reader.metadata(folder / name).item_metadata
                if metadata is None:
                    raise ValueError(f"{name} is missing")
                check_shapes(metadata.tree, wanted[name], folder / name)
                arguments = ocp.checkpoint_utils.construct_restore_args(wanted[name])
                trees[name] = reader.restore(folder / name, item=wanted[name], restore_args=arguments)
        found = {name: _record(folder / name / "metadata") for name in ("data", "config")}
        restored = Restored(step, *(trees[name] for name in ARRAYS), found["data"], found["config"])
        return restored, progress.get("digests", {})

    def _set_aside(self, step: int) -> Path:
        """Move a damaged checkpoint out of the manager's sight."""
        self.manager.close()
        target = self.directory.parent / DAMAGED / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "_again")
            (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged {step}")
        self._open()
        return target


class AnotherModel(ValueError):
    """A good checkpoint, but of a model of other sizes."""


def check_shapes(found: Any, expected: Any, where: Path) -> None:
    """Raise AnotherModel unless two trees have the same names and shapes."""
    found, expected = _shapes(found), _shapes(expected)
    if found != expected:
        odd = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        shown = "; ".join(f"{name}: {found.get(name)} -> {expected.get(name)}" for name in odd[:4])
        raise AnotherModel(
            f"{where} is of another model than the one configured ({shown}{'; ...' if odd[4:] else ''}); give the "
            "settings it was trained with, or another output_dir."
        )


def _structs(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(x.shape) for path, x in flat}


class _Failures:
    """Turns whatever a failed save raises into one OSError."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        step, self.checkpoints.saving = self.checkpoints.saving, None
        kept = [number for number in complete_steps(self.checkpoints.directory) if number != step]
        intact = f"that of step {kept[-1]} is intact" if kept else "there is none before it"
        raise OSError(
            f"The checkpoint of step {step} could not be written ({_shortened(error)}); {intact}. Make room, then run "
            "the same command."
        ) from error


def complete_steps(directory: Path) -> list[int]:
    """Return the steps of checkpoints whose saves came to their end; Orbax gives a folder its name then."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def digests(tree: Any) -> dict[str, int]:
    """Return a number for every array, however it is spread: the sum of its words, each mixed with its place."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
    sums = jax.device_get(_digests([x for _, x in flat]))
    return {name: int(total) for name, total in zip(names, sums)}


@jax.jit
def _digests(arrays: list[Array]) -> list[UInt32[Array, ""]]:
    def digest(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        mixed = bits + jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)

    return [digest(x) for x in arrays]


def _record(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _shortened(error: BaseException) -> str:
    """An error in at most 240 characters, which keep its beginning and its end, where the cause is."""
    text = " ".join(str(error).partition("[source locations")[0].split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"
