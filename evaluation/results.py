"""What an evaluation found: one file for each encoder and method, and tables of all of them, and of what papers say."""

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


@dataclasses.dataclass(frozen=True)
class Result:
    """The scores of one encoder with one method.

    Attributes:
        encoder, method: their names.
        stride: pixels a cell of the encoder.
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


def path_of(folder: Path, encoder: str, method: str) -> Path:
    """Where the result of an encoder and a method is kept."""
    return folder / encoder / method / "result.json"


def load(folder: Path, encoder: str, method: str, settings: Mapping[str, Any]) -> Result | None:
    """Return a result that is there already; None if there is none.

    Raises:
        ValueError: if it was made with other settings; the message lists them.
    """
    path = path_of(folder, encoder, method)
    if not path.is_file():
        return None
    result = Result(**json.loads(path.read_text()))
    changed = changes(result.settings, json.loads(json.dumps(settings)))
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed.values())}); choose another output_dir, or "
            "delete the folder it is in."
        )
    return result


def save(folder: Path, result: Result) -> None:
    """Write a result."""
    path = path_of(folder, result.encoder, result.method)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(result), indent=1))


def write_tables(folder: Path, results: Sequence[Result]) -> None:
    """Write all results as `results.json`, `results.csv` and `results.md`, and scores by class as `classes.csv`."""
    names = list(dict.fromkeys(name for result in results for name in result.scores))
    head = ["encoder", "stride", "method", *names]
    rows = [[r.encoder, r.stride, r.method, *(text_of(r.scores.get(name)) for name in names)] for r in results]
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    with replacing(folder / "results.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    with replacing(folder / "results.md") as temporary:
        temporary.write_text(markdown(head, rows))
    classes = [
        [result.encoder, result.method, *row]
        for result in results
        if "class_names" in result.details
        for row in zip(*(result.details[name] for name in ("class_names", "iou", "band_iou")))
    ]
    if classes:
        with replacing(folder / "classes.csv") as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([["encoder", "method", "class", "IoU", "band_IoU"], *classes])


def markdown(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def show(results: Sequence[Result], config: Config) -> None:
    """Print all results, and after each encoder what papers say of the same data and encoder."""
    title = f"{config.task} on {config.dataset.name or config.dataset.root}"
    names = list(dict.fromkeys(name for result in results for name in result.scores))
    table = Table(title=title, title_justify="left")
    for name in ("encoder", "stride", "method"):
        table.add_column(name)
    for name in names:
        table.add_column(name, justify="right")
    for encoder in dict.fromkeys(r.encoder for r in results):
        for r in (r for r in results if r.encoder == encoder):
            table.add_row(encoder, str(r.stride), r.method, *(text_of(r.scores.get(name)) for name in names))
        for said in figures(config, config.encoders[encoder]):
            cells = (text_of(said.scores.get(name)) for name in names)
            table.add_row(f"({said.source})", "", said.method, *cells, style="dim")
        table.add_section()
    Console(width=max(140, Console().width)).print(table)


def text_of(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}"
