"""The published and the shipped checkpoints by their names, and any checkpoint by its path."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from anyup_core.checkpoints import fetching, formats, run_directory
from anyup_core.checkpoints.checkpoint import Checkpoint
from anyup_core.paths import user_path

RELEASES = {
    "anyup": "checkpoint/anyup_paper.pth",
    "anyup_multi_backbone": "checkpoint_v2/anyup_multi_backbone.pth",
}
"""Name -> path below the base address."""

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parents[1] / "weights").glob("*.safetensors"))}
"""Name -> file of the weights that come with this package; their model cards lie beside them."""

NAMES = (*RELEASES, *SHIPPED)

BASE_URL = "https://github.com/wimmerth/anyup/releases/download"  # or the environment variable ANYUP_RELEASES


def load(source: str | Path, *, ema: bool = False) -> Checkpoint:
    """Read a checkpoint that has a name, or any by its path; of a run, with `ema`, the average.

    Raises as `locate` and `formats.read` do.
    """
    return formats.read(locate(source), item=run_directory.EMA if ema else run_directory.PARAMS)


def locate(source: str | Path) -> Path:
    """Return the path of a checkpoint, fetching a published one if need be. A name goes before a path.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: for a path at which nothing is.
        ConnectionError: if a published checkpoint can be neither found in the cache nor fetched.
    """
    if isinstance(source, str) and source in RELEASES:
        return fetch(source)
    if isinstance(source, str) and source in SHIPPED:
        return SHIPPED[source]
    path = user_path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or path.suffix or "/" in source or os.sep in source:
        raise FileNotFoundError(f"{path} does not exist.")
    near = difflib.get_close_matches(source, NAMES, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"{source!r} is neither the name of a checkpoint nor an existing path.{hint} "
        f"The names are {', '.join(NAMES)}; a path ends in {', '.join(formats.SUFFIXES)} or is an Orbax directory."
    )


def fetch(name: str) -> Path:
    """Return the file of a published checkpoint, fetching it first unless the cache has it. Raises as `obtain` does."""
    url = f"{os.environ.get('ANYUP_RELEASES') or BASE_URL}/{RELEASES[name]}"
    return fetching.obtain(
        url, fetching.cache_directory() / url.rsplit("/", 1)[1], lambda part: formats.read(part, kind=formats.TORCH)
    )
