"""The devices that jax computes on, and the programs that are compiled for them."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import jax

from anyup_core.checkpoints.fetching import cache_directory
from anyup_core.paths import user_path

VARIABLE = "ANYUP_COMPILATION_CACHE"  # of the environment: a folder for compiled programs, or "off"
LARGEST = 2 << 30  # bytes of programs that are kept; those that were not used for longest go first
SHORTEST = 0.2  # seconds of compilation that are worth a file


def prepare_devices() -> None:
    """Do what every command does before it computes: `check_devices` and `keep_compiled`."""
    check_devices()
    keep_compiled()


def check_devices() -> None:
    """Raise OSError unless jax finds a device of the platforms that it may use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # of CUDA without its plugin, jax asserts without a message
        platforms = getattr(jax.config, "jax_platforms", None) or ""
        reason = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
        raise OSError(
            f"jax finds no device with JAX_PLATFORMS={platforms}{reason}; unset it to compute on what there is, or "
            "install jax for that platform."
        ) from error


def keep_compiled() -> Path | None:
    """Keep compiled programs on disk, so that they are compiled once and not in every process; return their folder.

    The folder is the one that `ANYUP_COMPILATION_CACHE` names, or `compiled` in `ANYUP_CACHE`, and a subfolder of the
    processor, for which a program is compiled. None if the variable is "off", if a folder of jax's own settings
    (`JAX_COMPILATION_CACHE_DIR`) is in use, or, with a warning, if it cannot be written.
    """
    given = os.environ.get(VARIABLE)
    settings: Any = jax.config
    if given == "off" or settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return None
    folder = (user_path(given) if given else cache_directory() / "compiled") / processor()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
        reason = "" if writable else "it is not writable"
    except OSError as error:
        writable, reason = False, str(error)
    if not writable:
        message = f"Compiled programs are not kept in {folder}: {reason}. Set {VARIABLE} to another folder, or to off."
        warnings.warn(message, stacklevel=2)
        return None
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # whether there is one is decided when the first program is compiled
    return folder


def processor() -> str:
    """Return a name of this kind of processor: a home folder may be shared by machines of several kinds."""
    described = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    described += sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return f"{platform.machine() or 'machine'}-{hashlib.sha256(' '.join(described).encode()).hexdigest()[:12]}"
