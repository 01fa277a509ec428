"""The folder of a run: what it may hold before the run starts, its lock, and the configuration kept in it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from anyup_core.files import replacing
from anyup_core.settings import from_dict, to_dict
from train.config import Config, differences

LOCK, HOLDER = ".lock", ".lock-holder"


def check_output(output: Path, config: Config) -> None:
    """Check that a run can start or resume in a folder, which need not exist.

    Raises:
        FileExistsError: if it is a file, or a folder that holds something else.
        OSError: if it cannot be read.
        ValueError: if it holds a run of another configuration; the message lists the differences.
    """
    saved = output / "config.yaml"
    with naming(output):
        if not saved.is_file():
            names = {output.name} if output.is_file() else set(os.listdir(output)) if output.is_dir() else set()
            if any(name != "checkpoints" and not name.startswith(".") for name in names):
                raise FileExistsError(
                    f"output_dir={output} holds something that is no training run; name another folder."
                )
            return
        try:
            before = from_dict(Config, yaml.safe_load(saved.read_bytes()))  # later settings get their defaults
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(
                f"output_dir={output} cannot be resumed: its config.yaml is damaged ({error}); restore that file, or "
                "name another output_dir."
            ) from error
    if changed := differences(to_dict(before), to_dict(config)):
        raise ValueError(
            f"output_dir={output} holds a run with other settings ({'; '.join(changed)}): undo them to resume it, or "
            "name another output_dir."
        )


@contextlib.contextmanager
def naming(output: Path) -> Iterator[None]:
    """Say in an error of the system which setting it is due to."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"output_dir={output} cannot be used ({error}); name another folder.") from error


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the folder, which is created if it does not exist, for this run; the lock ends with the process.

    Raises:
        FileExistsError: if another run holds it; the message names its host and process.
    """
    holder = output / HOLDER  # the lock's own file is emptied by whoever tries to take it
    try:
        with naming(output):
            output.mkdir(parents=True, exist_ok=True)
            lock = FileLock(output / LOCK, blocking=False).acquire()
    except Timeout:
        by = holder.read_text().strip() if holder.is_file() else "another process"
        raise FileExistsError(
            f"output_dir={output} is in use by {by}; wait for that run to end, or name another output_dir."
        ) from None
    with lock:
        holder.write_text(f"process {os.getpid()} on host {socket.gethostname()}\n")
        yield


def write_config(output: Path, config: Config) -> None:
    """Write the configuration to `config.yaml`, unless it holds this one already."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    path = output / "config.yaml"
    if path.is_file() and path.read_text() == text:
        return
    with replacing(path) as temporary:
        temporary.write_text(text)
