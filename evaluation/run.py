"""`python -m evaluation.run [NAME=VALUE ...]`: score upsamplers; the same command resumes a run that was stopped.

Exit status: 0 finished; 2 impossible as configured, or a file cannot be read or written.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from anyup_core.settings import from_dict
from evaluation import presets
from evaluation.config import Config

IMPOSSIBLE = 2
presets.register()


@hydra.main(version_base="1.3", config_path=None, config_name=presets.NAME)
def launch(settings: DictConfig) -> None:
    try:
        config = from_dict(Config, OmegaConf.to_container(settings, resolve=True))
        from evaluation import results, tasks  # jax is imported once the configuration is known to be possible

        results.show(tasks.run(config), config)
    except (ValueError, ImportError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(IMPOSSIBLE)


if __name__ == "__main__":
    launch()
