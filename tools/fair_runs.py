"""The runs of the fair table, as words of `train.run` and `evaluation.run`, and which of them are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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
VIEWS = {
    "anyup": "the photograph at 224 x 224, 7 x 7 cells; 4 crops of 224 x 224; its consistency and input terms",
    "jafar": "the photograph at a quarter to a half of 448 x 448, 4 x 4 to 7 x 7 cells; at 448 x 448; its noise",
    "naf": "the photograph at 224 x 224, 7 x 7 cells; at 448 x 448",
    "featup": "the photograph at 224 x 224, 7 x 7 cells; 5 jitters of it; its CRF term",
}
"""What the encoder sees in training: the input and the targets."""

PROBES: dict[str, str] = {"probe.flip": "false", "probe.pixel_stride": "4", "pictures": "0"}
"""Of all evaluations."""
UNSEEN = ("lite1", "lite2")
SHIPPED = "anyup_efficientnet_lite"
EVALUATIONS = ("agnostic", "single", "shipped")
"""AnyUp and NAF on all encoders; JAFAR and FeatUp on the one they were trained on; the weights that ship."""


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


def scoring(data: Path, out: Path, evaluation: str, seed: int) -> list[str]:
    """Return the words after `python -m` that train and score probes; `evaluation` is of `EVALUATIONS`."""
    encoders = [f"+encoders.{name}.name=efficientnet_{name}" for name in UNSEEN]
    weights = {name: run_of(out, name, seed) for name in OWN}
    if evaluation == "single":
        methods = ["jafar", "featup"]
        chosen = [f"+upsamplers.{name}.weights.lite0={weights[name]}" for name in methods]
    elif evaluation == "agnostic":
        methods = ["bilinear", "anyup", "naf"]
        chosen = [f"anyup.weights={weights['anyup']}", f"+upsamplers.naf.weights.all={weights['naf']}", *encoders]
    else:
        methods, chosen = ["anyup"], [f"anyup.weights={SHIPPED}", *encoders]
    folders = {"cache": cache_of(out, evaluation, seed), "output_dir": scores_of(out, evaluation, seed)}
    settings = {"dataset.root": data / "cutouts"} | PROBES | {"seed": seed} | folders
    return ["evaluation.run", f"methods=[{','.join(methods)}]", *chosen, *words(settings)]


def scores_of(out: Path, evaluation: str, seed: int) -> Path:
    """Return the folder of an evaluation."""
    return out / "scores" / f"{evaluation}_{seed}"


def cache_of(out: Path, evaluation: str, seed: int) -> Path:
    """Return the folder of what an evaluation keeps until it is complete."""
    return out / "cache" / f"{evaluation}_{seed}"


def scored(out: Path, evaluation: str, seed: int) -> bool:
    """Return whether an evaluation is complete."""
    return (scores_of(out, evaluation, seed) / "results.json").is_file()


def of_seed(data: Path, out: Path, seed: int) -> list[list[str]]:
    """Return all runs of a seed, complete or not."""
    runs = [training(data, out, method, seed) for method in OWN]
    return runs + [scoring(data, out, evaluation, seed) for evaluation in EVALUATIONS]


def train(data: Path, out: Path, seeds: Sequence[int]) -> Iterator[list[str]]:
    """Yield the training runs that are not complete."""
    for seed in seeds:
        yield from (training(data, out, method, seed) for method in OWN if not trained(out, method, seed))


def evaluate(data: Path, out: Path, seeds: Sequence[int]) -> Iterator[list[str]]:
    """Yield the evaluations that are not complete, and remove what they kept once they are.

    Raises FileNotFoundError if weights are missing.
    """
    for seed in seeds:
        missing = [str(run_of(out, method, seed)) for method in OWN if not trained(out, method, seed)]
        if missing:
            raise FileNotFoundError(
                f"{', '.join(missing)}: not trained to step {STEPS}; python -m tools.fair_table train"
            )
        for evaluation in EVALUATIONS:
            if not scored(out, evaluation, seed):
                yield scoring(data, out, evaluation, seed)
            if scored(out, evaluation, seed):
                shutil.rmtree(cache_of(out, evaluation, seed), ignore_errors=True)
