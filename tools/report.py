"""`python -m tools.report OUT.md --attempt RUN EVALUATION ...`: training runs and their scores as one document.

An attempt is a folder of `train.run` and the folder of the `evaluation.run` that scored it. The document shows, for
every attempt, the curve of the objective, the settings that differ from those of the first attempt, and the scores of
each encoder less those of bilinear interpolation. The table of scores and the sheets of predictions are those of the
first attempt. Runs without scores, such as the one whose weights an attempt started from, are shown with their curves
and settings (`--training`). All numbers are read from the folders and recorded in OUT.json: a later document can show
these attempts beside its own when the folders are gone (`--earlier OUT.json`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from anyup_core import command, figure
from anyup_core.files import replacing
from anyup_core.paths import user_path
from anyup_core.settings import changes, flat
from evaluation.results import Result, markdown, texts_of

LOCAL = (
    "output_dir", "dataset.root", "dataset.index", "log.", "checkpoint.every", "checkpoint.keep", "profile.", "mesh."
)  # fmt: skip
SMOOTHED = 25  # points of the curve that are averaged
LOGGED = ("step", "time", "loss")  # of each line of the log
GAINS = "mIoU", "band_mIoU"
REFERENCE_GAINS = *GAINS, "mIoU_bilinear_probe", "band_bilinear_probe"
HOUR = 3600
PAUSE = 600  # seconds; a longer time between two lines does not count as training


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A training run and its scores.

    Attributes:
        name: of the run's folder.
        settings: of the run.
        metrics: the lines of its log.
        results: of its evaluation; empty if it was not scored.
        evaluation: the folder of the results; None if they come from a record, or there are none.
    """

    name: str
    settings: Mapping[str, Any]
    metrics: Sequence[Mapping[str, int | float]]
    results: Sequence[Result]
    evaluation: Path | None

    @classmethod
    def read(cls, run: Path, evaluation: Path | None = None) -> Attempt:
        """Read the folders. Raises FileNotFoundError if one is not of a finished `train.run` or `evaluation.run`."""
        _check(run / "config.yaml", "train.run")
        lines = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
        results = read_results(evaluation) if evaluation else []
        settings = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        return cls(run.name, settings, [lines[step] for step in sorted(lines)], results, evaluation)

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Attempt:
        """Return the attempt of which `record` was made, without what the document does not need."""
        results = [Result(**result, details={}) for result in record["results"]]
        metrics = [dict(zip(LOGGED, row)) for row in record["metrics"]]
        return cls(record["name"], record["settings"], metrics, results, None)

    def record(self) -> dict[str, Any]:
        """Return all that the document needs, as JSON values; without the paths and devices of the machine."""
        settings = {name: value for name, value in flat(self.settings).items() if not name.startswith(LOCAL)}
        results = [dataclasses.asdict(result) for result in self.results]
        for result in results:
            del result["details"]
        metrics = [[row[name] for name in LOGGED] for row in self.metrics]
        return dict(name=self.name, settings=settings, metrics=metrics, results=results)

    @property
    def steps(self) -> int:
        """Finished steps."""
        return int(self.metrics[-1]["step"])

    @property
    def hours(self) -> float:
        """Time between the lines of the log, without pauses."""
        times = np.diff([row["time"] for row in self.metrics])
        return float(times[times < PAUSE].sum()) / HOUR

    @property
    def images(self) -> str:
        """The images of each split that were used for the scores."""
        return images_of(self.results)

    def gains(self) -> dict[str, dict[str, float]]:
        """Return, of each encoder, AnyUp's scores less those of bilinear interpolation."""
        return gains_of(self.results, "anyup", GAINS)


def _check(path: Path, maker: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a folder that python -m {maker} has finished.")


def read_results(evaluation: Path) -> list[Result]:
    """Return the results in a folder. Raises FileNotFoundError if `evaluation.run` has not finished there."""
    _check(evaluation / "results.json", "evaluation.run")
    return [Result(**result) for result in json.loads((evaluation / "results.json").read_text())]


def images_of(results: Sequence[Result]) -> str:
    """Return which images of each split were used."""
    limit = results[0].settings["limit"]
    return "all images" if limit is None else f"the first {limit} images"


def gains_of(results: Sequence[Result], method: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return, for each encoder, a method's scores less those of bilinear interpolation."""
    scores = {(r.encoder, r.method): r.scores for r in results}
    return {
        encoder: {name: scores[encoder, method][name] - scores[encoder, "bilinear"][_base(name)] for name in names}
        for encoder, other in scores
        if other == method and (encoder, "bilinear") in scores
    }


def _base(name: str) -> str:
    """Return the score of bilinear interpolation that a score of another method is compared with."""
    return {"mIoU_bilinear_probe": "mIoU", "band_bilinear_probe": "band_mIoU"}.get(name, name)


def write(
    path: Path,
    attempts: Sequence[Attempt],
    note: str = "",
    shown: Sequence[str] | None = None,
    reference: Sequence[Result] = (),
) -> None:
    """Write the document, and its record and pictures beside it.

    Args:
        path: the document.
        attempts: the runs; the document shows the table and the sheets of the first, which must not come from a record.
        note: the last paragraph.
        shown: encoders whose sheets of predictions are shown; None for all that have one.
        reference: results of `label_guided` and of bilinear interpolation.

    Raises:
        FileNotFoundError: if an encoder to be shown has no sheet.
        ImportError: if matplotlib is not installed.
        OSError: if something cannot be written.
    """
    first = attempts[0]
    assert first.evaluation is not None
    drawn = {sheet.parent.name: sheet for sheet in first.evaluation.glob("*/sheet.png")}
    chosen = [r.encoder for r in first.results if r.encoder in drawn] if shown is None else shown
    if missing := [encoder for encoder in chosen if encoder not in drawn]:
        there = ", ".join(sorted(drawn)) or "none"
        raise FileNotFoundError(f"{first.evaluation} has no sheet of {', '.join(missing)}; choose of {there}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(path.with_name(f"{path.stem}_curves.png"), attempts)
    sheets = {encoder: path.with_name(f"{path.stem}_{encoder}.png") for encoder in chosen}
    for encoder, sheet in sheets.items():
        with replacing(sheet) as temporary:
            shutil.copyfile(drawn[encoder], temporary)
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(dump([attempt.record() for attempt in attempts]))
    with replacing(path) as temporary:
        temporary.write_text(
            "\n".join([*document(path, attempts, list(sheets.values()), reference), *([note, ""] if note else [])])
        )


def document(
    path: Path, attempts: Sequence[Attempt], sheets: Sequence[Path], reference: Sequence[Result] = ()
) -> list[str]:
    """Return the lines of the document."""
    first = attempts[0]
    settings = first.results[0].settings
    names = list(dict.fromkeys(name for r in first.results for name in r.scores if name != "seconds"))
    rows = [[r.encoder, r.stride, r.method, *texts_of(r.scores, names)] for r in first.results]
    size = " x ".join(map(str, settings["dataset"]["size"]))
    repeats = settings["probe"].get("repeats", 1)
    seeds = f"seed {settings['seed']}" if repeats == 1 else (
        f"means of {repeats} probes from the seed {settings['seed']} on (*std*: their standard deviation)"
    )  # fmt: skip
    lines = [
        "# Results",
        "",
        "This page was written by `python -m tools.report`; every number is read from the folders of the runs.",
        "",
        "## Training",
        "",
        f"![the objective by step]({path.stem}_curves.png)",
        "",
        f"Shown is the mean of {SMOOTHED} logged steps. Tables and predictions are those of `{first.name}`.",
        "",
        markdown(["run", "steps", "hours", "objective at the end", f"set otherwise than in `{first.name}`"], [
            [f"`{a.name}`", a.steps, f"{a.hours:.1f}", f"{smooth(a.metrics)[-1]:.4f}", _differences(first, a)]
            for a in attempts
        ]),
        "## Probes",
        "",
        f"Linear probes for {settings['task']} at {size}, {settings['probe']['epochs']} epochs, {seeds}, "
        f"{first.images} of each split, all trained in the same way on frozen features. *band*: pixels within 4 of an "
        "edge. *bilinear_probe*: the probe of bilinear features on those of the method, without retraining.",
        "",
        markdown(["encoder", "stride", "method", *names], rows),
        "AnyUp less bilinear, by run:",
        "",
        markdown(["run", "images", "encoder", *GAINS], [
            [f"`{a.name}`", a.images, encoder, *(f"{gain[name]:+.4f}" for name in GAINS)]
            for a in attempts
            for encoder, gain in a.gains().items()
        ]),
    ]  # fmt: skip
    if reference:
        lines += [
            "## What there is to be gained",
            "",
            "`label_guided` averages the cells of the same window by how many of their pixels have the label of the "
            f"position: an upsampler that knows every edge. Less bilinear, {images_of(reference)}; *bilinear_probe* as "
            "above:",
            "",
            markdown(["encoder", *REFERENCE_GAINS], [
                [encoder, *(f"{gain[name]:+.4f}" for name in REFERENCE_GAINS)]
                for encoder, gain in gains_of(reference, "label_guided", REFERENCE_GAINS).items()
            ]),
        ]  # fmt: skip
    lines += ["## Predictions", ""] if sheets else []
    for sheet in sheets:
        lines += [f"![image, label and predictions]({sheet.name})", ""]
    return lines


def dump(records: Sequence[Mapping[str, Any]]) -> str:
    """Return JSON with a line for each attempt."""
    return "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n"


def read_record(path: Path) -> list[Attempt]:
    """Return the attempts of a record. Raises FileNotFoundError if it does not exist, ValueError if it is no record."""
    try:
        return [Attempt.recorded(record) for record in json.loads(path.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record that python -m tools.report has written.") from error


def draw_curves(path: Path, attempts: Sequence[Attempt]) -> None:
    """Draw the objective of every attempt by step."""
    drawing = figure.load_figure_class()(figsize=(8, 3.6), dpi=150, facecolor="white", layout="constrained")
    axes = drawing.add_subplot()
    for attempt in attempts:
        steps = [row["step"] for row in attempt.metrics]
        axes.plot(steps, smooth(attempt.metrics), label=attempt.name, linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("objective")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="run")
    with replacing(path) as temporary:
        drawing.savefig(temporary)


def smooth(metrics: Sequence[Mapping[str, int | float]]) -> np.ndarray:
    """Return the objective, each value the mean of the last `SMOOTHED` that were logged."""
    losses = np.cumsum([0.0, *(row["loss"] for row in metrics)])
    ends = np.arange(1, len(losses))
    starts = np.maximum(ends - SMOOTHED, 0)
    return (losses[ends] - losses[starts]) / (ends - starts)


def _differences(first: Attempt, other: Attempt) -> str:
    """List the settings that differ, except for paths and the like; of an encoder that one run lacks, the name only."""
    both = [flat(run.settings) for run in (first, other)]

    def listed(name: str) -> bool:
        encoder = ".".join(name.split(".")[:2]) + ".name"
        shared = name == encoder or not name.startswith("encoders.") or all(encoder in run for run in both)
        return shared and not name.startswith(LOCAL)

    return "; ".join(f"`{text}`" for name, text in changes(*both).items() if listed(name)) or "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the document and return the exit status, see `anyup_core.command`."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description="Write the document of training runs.")
    parser.add_argument("out", type=user_path, metavar="OUT.md", help="the document; its pictures are put beside it")
    parser.add_argument(
        "--attempt", nargs=2, type=user_path, action="append", required=True, metavar=("RUN", "EVALUATION"),
        help="folders of train.run and evaluation.run; may be repeated, the table and sheets are those of the first",
    )  # fmt: skip
    parser.add_argument(
        "--training", type=user_path, action="append", default=[], metavar="RUN",
        help="a folder of train.run that was not scored; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--earlier",
        type=user_path,
        metavar="OUT.json",
        help="the record of an earlier document; its attempts come last",
    )
    parser.add_argument(
        "--reference",
        type=user_path,
        metavar="EVALUATION",
        help="an evaluation with bilinear and label_guided",
    )
    parser.add_argument(
        "--sheets", nargs="*", metavar="ENCODER", help="encoders whose sheets of predictions are shown; default: all"
    )
    parser.add_argument(
        "--note", default="", metavar="TEXT", help="the last paragraph, such as the source of the images"
    )

    def work() -> None:
        args = parser.parse_args(argv)
        attempts = [Attempt.read(*folders) for folders in args.attempt]
        attempts += [Attempt.read(folder) for folder in args.training]
        attempts += read_record(args.earlier) if args.earlier else []
        reference = read_results(args.reference) if args.reference else []
        write(args.out, attempts, args.note, args.sheets, reference)
        print(f"written: {args.out}")

    return command.execute(work)


if __name__ == "__main__":
    sys.exit(main())
