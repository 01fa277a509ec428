"""`python -m train.run [NAME=VALUE ...]`: train AnyUp; the same command resumes a run that stopped.

Exit status: 0 finished, 2 impossible as configured, 3 loss not finite, 74 a file could not be written or batches not be
prepared, 75 stopped by SIGTERM, SIGHUP or SIGINT after saving (run the same command again). Before the first step these
end it with 128 + their number, and a second SIGINT does at any time.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from anyup_core import command
from anyup_core.paths import for_hydra
from anyup_core.settings import from_dict
from train import presets
from train.config import Config

RESUMES = "the same command goes on from the newest checkpoint"
presets.register()


@hydra.main(version_base="1.3", config_path=None, config_name=presets.NAME)
def launch(settings: DictConfig) -> None:
    values = OmegaConf.to_container(settings, resolve=True)
    dry = bool(values.pop("dry_run", False))
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        values["output_dir"] = str(Path(values["output_dir"]) / str(HydraConfig.get().job.num))
    quieten_orbax()

    def work() -> int:
        config = from_dict(Config, values)
        from train import loop  # imports jax, which an invalid configuration need not wait for

        return loop.run(config, dry=dry)

    if status := command.execute(work, hint=RESUMES):
        sys.exit(status)


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
