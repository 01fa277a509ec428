"""The folder of a run: what it may hold before the run starts, its lock, and the configuration kept in it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import yaml
from filelock import FileLock, Timeout

from anyup_core.files import replacing
from anyup_core.settings import from_dict, to_dict
from train.config import Config, differences

LOCK, HOLDER = ".lock", ".lock-holder"
SILENCE = 60.0  # seconds without a sign of life, after which a run on another host counts as dead
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def check_output(output: Path, config: Config) -> Config:
    """Check that a run can start or resume in a folder, which need not exist, and return its configuration.

    It has the means and deviations of the bands that the run there has measured, unless they are given.

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
            return config
        try:
            before = from_dict(Config, yaml.safe_load(saved.read_bytes()))  # later settings get their defaults
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(
                f"output_dir={output} cannot be resumed: its config.yaml is damaged ({error}); restore that file, or "
                "name another output_dir."
            ) from error
    old, new = to_dict(before), to_dict(config)
    if config.bands is not None and config.dataset.mean is None:
        new["dataset"] |= {name: old["dataset"][name] for name in ("mean", "std")}
    if changed := differences(old, new):
        raise ValueError(
            f"output_dir={output} holds a run with other settings ({'; '.join(changed)}): undo them to resume it, or "
            "name another output_dir."
        )
    return from_dict(Config, new)


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

    Some shared file systems have no locks, or none that other hosts see. So the run's sign of life is renewed too, and
    a holder on another host whose sign stands still for `SILENCE` seconds is dead.

    Raises:
        FileExistsError: if another run holds it; the message names its host and process.
    """
    holder = output / HOLDER  # the lock's own file is emptied by whoever tries to take it
    with contextlib.ExitStack() as held:
        with naming(output):
            output.mkdir(parents=True, exist_ok=True)
            shared = True
            try:
                held.enter_context(FileLock(output / LOCK, blocking=False, fallback_to_soft=False))
                shared = False
            except Timeout:
                refuse(output, holder)
            except (OSError, NotImplementedError) as error:
                if not isinstance(error, NotImplementedError) and error.errno not in WITHOUT_LOCKS:
                    raise
            by = holder.read_text() if holder.is_file() else ""
            if by and (shared or not by.endswith(f" {socket.gethostname()}\n")):
                waiting = f"waiting {SILENCE:.0f} s for a sign of life"
                print(f"output_dir={output} was held by {by.strip()}; {waiting}", flush=True)
                if alive(holder):
                    refuse(output, holder)
            holder.write_text(f"process {os.getpid()} on host {socket.gethostname()}\n")
        ended = threading.Event()
        threading.Thread(target=renew, args=(holder, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            holder.unlink(missing_ok=True)


def refuse(output: Path, holder: Path) -> NoReturn:
    by = holder.read_text().strip() if holder.is_file() else "another process"
    raise FileExistsError(
        f"output_dir={output} is in use by {by}; wait for that run to end, or name another output_dir."
    )


def alive(holder: Path) -> bool:
    """Wait until a sign of life is renewed, or is not for `SILENCE` seconds."""
    begin, before = time.monotonic(), holder.stat().st_mtime_ns
    while time.monotonic() - begin < SILENCE:
        time.sleep(SILENCE / 60)
        try:
            if holder.stat().st_mtime_ns != before:
                return True
        except FileNotFoundError:  # it has ended
            return False
    return False


def renew(holder: Path, ended: threading.Event) -> None:
    """Give signs of life until the run has ended."""
    while not ended.wait(SILENCE / 6):
        with contextlib.suppress(OSError):
            os.utime(holder)


def write_config(output: Path, config: Config) -> None:
    """Write the configuration to `config.yaml`, unless it holds this one already."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    path = output / "config.yaml"
    if path.is_file() and path.read_text() == text:
        return
    with replacing(path) as temporary:
        temporary.write_text(text)
