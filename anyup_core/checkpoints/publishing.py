"""Saves a model as a folder that both frameworks load, and pushes it to the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from anyup_core.checkpoints import formats, hub, model_card
from anyup_core.checkpoints.checkpoint import Checkpoint
from anyup_core.paths import user_path


def save(
    folder: str | os.PathLike,
    checkpoint: Checkpoint,
    *,
    run: str | os.PathLike | None = None,
    license: str | None = None,
    overwrite: bool = False,
    name: str | None = None,
) -> Path:
    """Write `config.json`, `model.safetensors` and the card `README.md`, and return the folder.

    Args:
        folder: a new or an empty directory, or with `overwrite` one of such a model; its parent exists.
        checkpoint: the weights and the configuration.
        run: the training run that the weights are of, for the card.
        license: identifier of the weights' licence on the hub, for the card.
        overwrite: replace a model that is there.
        name: how the card calls the model; the folder's name by default.

    Raises:
        FileExistsError: if something else is there.
        ValueError: if `run` is no training run, or `license` no identifier.
    """
    path = user_path(folder)
    source = None if run is None else user_path(run)
    card = model_card.text(checkpoint.config, name=name or path.name, run=source, licence=license)
    return formats.write(path, checkpoint, overwrite=overwrite, kind=formats.HUB, card=card)


def push(
    repository: str,
    checkpoint: Checkpoint,
    *,
    run: str | os.PathLike | None = None,
    license: str | None = None,
    **options: Any,
) -> str:
    """Upload what `save` writes, and return the address of the commit.

    Args:
        repository: "org/name"; it is created if there is none.
        checkpoint, run, license: as for `save`.
        options: `private`, `revision` and `message`, as for `hub.push`.

    Raises as `save` and `hub.push` do.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(Path(temporary) / "model", checkpoint, run=run, license=license, name=repository)
        return hub.push(folder, repository, **{"message": "Upload AnyUp", **options})
