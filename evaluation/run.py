"""`python -m evaluation.run [NAME=VALUE ...]`: score upsamplers; the same command resumes a run that was stopped.

Exit status: 0 finished; 2 impossible as configured, or a file cannot be read or written; 128 + the number of a signal
that interrupted it.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from anyup_core import command
from anyup_core.paths import for_hydra
from anyup_core.settings import from_dict
from evaluation import presets
from evaluation.config import Config

RESUMES = "the same command goes on from there"
presets.register()


@hydra.main(version_base="1.3", config_path=None, config_name=presets.NAME)
def launch(settings: DictConfig) -> None:
    def work() -> None:
        config = from_dict(Config, OmegaConf.to_container(settings, resolve=True))
        from evaluation import results, tasks  # jax is imported once the configuration is known to be possible

        results.show(tasks.run(config), config)

    if status := command.execute(work, hint=RESUMES):
        sys.exit(status)


if __name__ == "__main__":
    sys.argv[1:] = map(for_hydra, sys.argv[1:])
    sys.exit(command.execute(launch, hint=RESUMES))
