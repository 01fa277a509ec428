"""`python -m train.run [NAME=VALUE ...]`: train AnyUp; the same command resumes a run that stopped.

Exit status: 0 finished, 2 impossible as configured, 3 loss not finite, 69 another process of the run has died (start
all of them again), 74 a file could not be written or batches not be prepared, 75 stopped by SIGTERM, SIGHUP or SIGINT
after saving (run the same command again). Before the first step these end it with 128 + their number, and a second
SIGINT does at any time.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from anyup_core import command
from anyup_core.paths import for_hydra
from anyup_core.settings import from_dict
from train import pod_member, presets
from train.config import Config

RESUMES = "the same command goes on from the newest checkpoint"
presets.register()


@hydra.main(version_base="1.3", config_path=None, config_name=presets.NAME)
def launch(settings: DictConfig) -> None:
    values = OmegaConf.to_container(settings, resolve=True)
    dry = bool(values.pop("dry_run", False))
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        values["output_dir"] = str(Path(values["output_dir"]) / str(HydraConfig.get().job.num))

    def supervised() -> int:
        if from_dict(Config, values).mesh.announcement() is not None:
            return pod_member.supervise(run, values, dry, hint=RESUMES)
        return run(values, dry)

    if status := command.execute(supervised, hint=RESUMES):
        sys.exit(status)


def run(values: dict[str, Any], dry: bool) -> int:
    """Train, in this process."""
    from train import loop  # imports jax, which an invalid configuration need not wait for

    quieten_orbax()
    return loop.run(from_dict(Config, values), dry=dry)


def quieten_orbax() -> None:
    """Silence a failed save, whose error Orbax also raises, and the writes of other arrays that end after it."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def print_exception(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":  # TensorStore calls back after the failure
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = print_exception


def main() -> None:
    sys.argv[1:] = ["+dry_run=true" if word == "--dry-run" else for_hydra(word) for word in sys.argv[1:]]
    sys.exit(command.execute(launch, hint=RESUMES))


if __name__ == "__main__":
    main()
