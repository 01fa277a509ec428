"""The scores of an evaluation: one file for each encoder and method, tables of all of them, and published figures."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anyup_core.files import replacing
from anyup_core.settings import changes
from evaluation.config import Config
from evaluation.published import figures

FILE = "result.json"  # of an encoder and a method


@dataclasses.dataclass(frozen=True)
class Result:
    """The scores of one encoder with one method.

    Attributes:
        encoder, method: their names.
        stride: pixels per cell of the encoder.
        scores: name -> value.
        details: lists, such as a score for each class.
        settings: all that the scores depend on.
    """

    encoder: str
    method: str
    stride: int
    scores: Mapping[str, float]
    details: Mapping[str, Any]
    settings: Mapping[str, Any]


def load(folder: Path, settings: Mapping[str, Any]) -> Result | None:
    """Return a result of an earlier run from its folder; None if there is none.

    Raises:
        ValueError: if the file is no result, or was written with other settings; the message lists them.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        result = Result(**json.loads(path.read_text()))
        changed = changes(result.settings, json.loads(json.dumps(settings)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result, or damaged ({error}); delete it.") from error
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed.values())}); choose another output_dir, or "
            "delete the folder it is in."
        )
    return result


def save(folder: Path, result: Result) -> None:
    """Write a result into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / FILE, json.dumps(dataclasses.asdict(result), indent=1))


def write_tables(folder: Path, results: Sequence[Result]) -> None:
    """Write all results as `results.json`, `results.csv` and `results.md`, and scores by class as `classes.csv`."""
    names = score_names(results)
    head = ["encoder", "stride", "method", *names]
    rows = [[r.encoder, r.stride, r.method, *texts_of(r.scores, names)] for r in results]
    _write(folder / "results.json", json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    _write_csv(folder / "results.csv", [head, *rows])
    _write(folder / "results.md", markdown(head, rows))
    classes = [
        [result.encoder, result.method, *row]
        for result in results
        if "class_names" in result.details
        for row in zip(*(result.details[name] for name in ("class_names", "iou", "band_iou")))
    ]
    if classes:
        _write_csv(folder / "classes.csv", [["encoder", "method", "class", "IoU", "band_IoU"], *classes])


def markdown(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def show(results: Sequence[Result], config: Config) -> None:
    """Print all results, and after those of each encoder the published figures of the same data and encoder."""
    names = score_names(results)
    table = Table(title=f"{config.task} on {config.dataset.name or config.dataset.root}", title_justify="left")
    for name in ("encoder", "stride", "method", *names):
        table.add_column(name, justify="right" if name in names else "left")
    for encoder in dict.fromkeys(r.encoder for r in results):
        for r in (r for r in results if r.encoder == encoder):
            table.add_row(encoder, str(r.stride), r.method, *texts_of(r.scores, names))
        for figure in figures(config, config.encoders[encoder]):
            table.add_row(f"({figure.source})", "", figure.method, *texts_of(figure.scores, names), style="dim")
        table.add_section()
    Console(width=max(140, Console().width), markup=False).print(table)


def score_names(results: Sequence[Result]) -> list[str]:
    """Return the names of all scores, in the order in which they first occur."""
    return list(dict.fromkeys(name for result in results for name in result.scores))


def texts_of(scores: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Return the named scores with four digits; "-" for one that is missing or not a number."""
    values = (scores.get(name, math.nan) for name in names)
    return ["-" if math.isnan(value) else f"{value:.4f}" for value in values]


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, newline="")
