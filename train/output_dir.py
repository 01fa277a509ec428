"""The folder of a run: what it may hold before the run starts, and the configuration that is kept in it."""

from __future__ import annotations

from pathlib import Path

import yaml

from anyup_core.files import replacing
from anyup_core.settings import from_dict, to_dict
from train.config import Config, differences


def check_output(output: Path, config: Config) -> None:
    """Check that a run can start or resume in a folder, which need not exist.

    Raises:
        FileExistsError: if it is a file, or a folder that holds something else.
        ValueError: if it holds a run of another configuration; the message lists the differences.
    """
    saved = output / "config.yaml"
    if not saved.is_file():
        if output.is_file() or (output.is_dir() and any(path.name != "checkpoints" for path in output.iterdir())):
            raise FileExistsError(f"output_dir={output} holds something that is no training run; name another folder.")
        return
    before = from_dict(Config, yaml.safe_load(saved.read_text()))  # settings that came later get their defaults
    if changed := differences(to_dict(before), to_dict(config)):
        raise ValueError(
            f"output_dir={output} holds a run with other settings ({'; '.join(changed)}): undo them to resume it, or "
            "name another output_dir."
        )


def write_config(output: Path, config: Config) -> None:
    """Write the configuration to `config.yaml`; the folder is created if it does not exist."""
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
