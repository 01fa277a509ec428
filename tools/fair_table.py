"""`python -m tools.fair_table train|evaluate|report DATA OUT`: AnyUp, JAFAR, NAF and FeatUp trained alike and compared.

Every run is one command of `train.run` or `evaluation.run`, which `commands` prints. `train` and `evaluate` skip what is
complete and resume what is not, so that the same command goes on after a stop. DATA holds `photos/train` and `cutouts`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from anyup_core import command
from anyup_core.paths import user_path

SEEDS = (0, 1, 2)
STEPS = 700
RECIPE: dict[str, str] = {
    "encoders": "efficientnet_lite0",
    "encoders.lite0.layer": "[-1]",
    "dataset": "folder",
    "dataset.crop_size": "[448,448]",
    "dataset.img_size": "[224,224]",
    "dataset.guidance_size": "[112,112]",
    "dataset.random_region": "0.4",
    "dataset.flip": "true",
    "optimizer": "adamw",
    "optimizer.learning_rate": "1e-3",
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": "50",
    "optimizer.clip_norm": "1",
    "batch_size": "2",
    "max_steps": str(STEPS),
    "dtype": "float32",
    "checkpoint.every": "50",
    "checkpoint.keep": "1",
    "log.pictures_every": "0",
    "log.tensorboard": "false",
}
"""Of all runs; objectives, views and targets are those of each method's own recipe."""
OWN: dict[str, dict[str, str]] = {
    "anyup": {"loss.consistency_size": "[112,112]"},
    "jafar": {},
    "naf": {"model.kernel_size": "7"},  # the whole photograph has 7 x 7 cells at half its size
    "featup": {"dataset.crop_size": "[224,224]"},  # its published recipe's, and 7 x 7 cells as the others have
}
"""What a method has besides, or instead."""


def words(settings: Mapping[str, object]) -> list[str]:
    """Return settings as words of a command line."""
    return [f"{name}={value}" for name, value in settings.items()]


def run_of(out: Path, method: str, seed: int) -> Path:
    """Return the folder of a training run."""
    return out / "runs" / f"{method}_{seed}"


def training(data: Path, out: Path, method: str, seed: int) -> list[str]:
    """Return the words after `python -m` that train a method."""
    folders = {"dataset.root": data / "photos/train", "dataset.index": out / "size_index.tsv"}
    settings = RECIPE | OWN[method] | folders | {"seed": seed, "output_dir": run_of(out, method, seed)}
    return ["train.run", f"model={method}", *words(settings)]


def trained(out: Path, method: str, seed: int) -> bool:
    """Return whether a training run has saved its last step."""
    return (run_of(out, method, seed) / "checkpoints" / str(STEPS) / "commit_success.txt").is_file()


def train(data: Path, out: Path, seeds: Sequence[int]) -> Iterator[list[str]]:
    """Yield the training runs that are not complete."""
    for seed in seeds:
        yield from (training(data, out, method, seed) for method in OWN if not trained(out, method, seed))


def execute(runs: Iterator[list[str]]) -> int:
    """Do runs one after the other; return the exit status of the first one that fails, or 0."""
    for run in runs:
        print("python -m", shlex.join(run), flush=True)
        if status := subprocess.run([sys.executable, "-m", *run], check=False).returncode:
            return status
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says and return the exit status, see `anyup_core.command`."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fair_table", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("what", choices=["commands", "train"])
    parser.add_argument("data", type=user_path, metavar="DATA", help="the folder with photos/train and cutouts")
    parser.add_argument("out", type=user_path, metavar="OUT", help="the folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="default: 0 1 2")

    def work() -> int:
        args = parser.parse_args(argv)
        if args.what == "commands":
            for run in (training(args.data, args.out, method, seed) for seed in args.seeds for method in OWN):
                print("python -m", shlex.join(run))
            return 0
        args.out.mkdir(parents=True, exist_ok=True)  # for the size index, which all runs share
        return execute(train(args.data, args.out, args.seeds))

    return command.execute(work, hint="the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
