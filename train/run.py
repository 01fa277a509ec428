"""`python -m train.run [NAME=VALUE ...]`: train AnyUp; the same command resumes a run that stopped.

Exit status: 0 finished, 2 impossible as configured, 3 loss not finite, 74 a checkpoint could not be written, 75 stopped
by SIGTERM or SIGINT after saving (run the same command again).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from anyup_core.settings import from_dict
from train import presets
from train.config import Config

IMPOSSIBLE = 2
presets.register()


@hydra.main(version_base="1.3", config_path=None, config_name=presets.NAME)
def launch(settings: DictConfig) -> None:
    values = OmegaConf.to_container(settings, resolve=True)
    dry = bool(values.pop("dry_run", False))
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        values["output_dir"] = str(Path(values["output_dir"]) / str(HydraConfig.get().job.num))
    quieten_orbax()
    try:
        config = from_dict(Config, values)
        from train import loop  # imports jax, which an invalid configuration need not wait for

        status = loop.run(config, dry=dry)
    except (ValueError, ImportError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        status = IMPOSSIBLE
    if status:
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
    sys.argv[1:] = ["+dry_run=true" if word == "--dry-run" else word for word in sys.argv[1:]]
    launch()


if __name__ == "__main__":
    main()
