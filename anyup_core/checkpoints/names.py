"""The published and the shipped checkpoints by their names, any by its path, and models on the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from anyup_core.checkpoints import fetching, formats, hub, hub_folder, run_directory, unwrapping
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


def load(source: str | Path, *, ema: bool = False, revision: str | None = None, file: str | None = None) -> Checkpoint:
    """Read a checkpoint that has a name, any by its path, or one of the hub; of a run, with `ema`, the average.

    A file of the hub that is named with `file` takes what its tensors do not tell from the `config.json` of the
    repository, if that is AnyUp's.

    Raises as `locate` and `formats.read` do.
    """
    path = locate(source, revision=revision, file=file)
    checkpoint = formats.read(path, item=run_directory.EMA if ema else run_directory.PARAMS)
    if file is None:
        return checkpoint
    folder = hub.snapshot(path, file)
    if not hub_folder.describes_anyup(folder):
        return checkpoint
    beside = formats.read_config(folder, kind=formats.HUB)
    told = {name: beside[name] for name in unwrapping.ARGUMENTS if name in beside}
    return Checkpoint(checkpoint.tensors, {**checkpoint.config, **told})


def locate(source: str | Path, *, revision: str | None = None, file: str | None = None) -> Path:
    """Return the path of a checkpoint, fetching one that has a name, or is on the hub, if need be.

    A name of ours goes before a path, and a path that exists before a repository of the hub.

    Args:
        source: a name, a path, or "org/name" on the hub.
        revision: branch, tag or commit of a repository; the main branch by default.
        file: a weight file of a repository; `config.json` and `model.safetensors` by default.

    Raises:
        ValueError: for an unknown name, a repository of another model, or options that `source` does not have.
        FileNotFoundError: for a path at which nothing is, or if the hub has no such repository, revision or file.
        PermissionError: for a repository that may not be read.
        ConnectionError: if a checkpoint can be neither found in the cache nor fetched.
    """
    named = isinstance(source, str) and source in NAMES
    path = user_path(source)
    if isinstance(source, str) and not named and not path.exists() and _may_be_on_hub(source):
        return fetch_from_hub(source, revision=revision, file=file)
    if given := [
        f"{name}={value!r}" for name, value in dict(revision=revision, file=file).items() if value is not None
    ]:
        raise ValueError(f"{' and '.join(given)} belongs to a repository of the hub, which {str(source)!r} is not.")
    if named:
        return SHIPPED[str(source)] if source in SHIPPED else fetch(str(source))
    if path.exists():
        return path
    if isinstance(source, Path) or path.suffix or "/" in source or os.sep in source:
        raise FileNotFoundError(f"{path} does not exist.")
    near = difflib.get_close_matches(source, NAMES, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"{source!r} is neither the name of a checkpoint nor an existing path.{hint} "
        f"The names are {', '.join(NAMES)}; a path ends in {', '.join(formats.SUFFIXES)} or is a directory; a model on "
        "the Hugging Face hub is called org/name."
    )


def _may_be_on_hub(source: str) -> bool:
    """Return whether a string that is no path can be "org/name", rather than a weight file that is missing."""
    suffix = Path(source).suffix.lower()
    return suffix not in (*formats.SUFFIXES, *formats.READ_ONLY, *formats.FOREIGN) and hub.is_name(source)


def fetch_from_hub(repository: str, *, revision: str | None = None, file: str | None = None) -> Path:
    """Return the folder of a model in the hub's cache, or the weight file that `file` names; raises as `locate`."""
    if file is None:
        folder = hub.fetch(repository, hub_folder.CONFIG, revision).parent
        formats.read_config(folder, kind=formats.HUB)  # before the weights, which may be large
        return hub.fetch(repository, hub_folder.WEIGHTS, folder.name).parent
    suffixes = (*formats.SUFFIXES, *formats.READ_ONLY)
    if Path(file).suffix.lower() not in suffixes:
        raise ValueError(f"file={file!r} is no weight file; its suffix must be one of {', '.join(suffixes)}.")
    path = hub.fetch(repository, file, revision)
    hub.fetch_beside(repository, hub_folder.CONFIG, hub.snapshot(path, file))
    return path


def fetch(name: str) -> Path:
    """Return the file of a published checkpoint, fetching it first unless the cache has it. Raises as `obtain` does."""
    url = f"{os.environ.get('ANYUP_RELEASES') or BASE_URL}/{RELEASES[name]}"
    return fetching.obtain(
        url, fetching.cache_directory() / url.rsplit("/", 1)[1], lambda part: formats.read(part, kind=formats.TORCH)
    )
