"""The model card of a model: how to load it, its configuration, and what is known of the run that trained it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyup_core.checkpoints import run_directory
from anyup_core.settings import flat

ROWS = 10  # of the curve
DATA, RECIPE = ("encoders", "dataset"), ("batch_size", "seed", "dtype", "features", "loss", "optimizer")
LOCAL = ("index", "threads", "prefetch", "weights", "workers", "root")
"""Last parts of settings that say where or how a run worked on its machine."""
NOT_SCALARS = ("step", "time", "images_per_second", "memory_bytes")  # of a line of metrics.jsonl, for the curve

PAPER = "https://arxiv.org/abs/2510.12764"


def text(config: Mapping[str, Any], *, name: str, run: Path | None = None, licence: str | None = None) -> str:
    """Return the card in Markdown. What is not known is left out.

    Args:
        config: fields of `AnyUpConfig`.
        name: of the repository or of the folder, as `from_pretrained` takes it.
        run: folder of the training run, of its checkpoints, or of one step.
        licence: its identifier on the hub, such as "apache-2.0" or "cc-by-4.0".

    Raises:
        ValueError: if `run` is no training run, or `licence` no identifier.
    """
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9.-]+", licence):
        raise ValueError(f"license={licence!r} is no identifier of a licence; give one such as apache-2.0.")
    tags = ("anyup", "feature-upsampling", "jax", "pytorch")
    head = ["---", "library_name: anyup-jax", *([f"license: {licence}"] if licence else []), "tags:"]
    head += [*(f"- {tag}" for tag in tags), "---"]
    fields = {field: value for field, value in config.items() if field != "backend"}
    parts = [
        "\n".join(head),
        f"# {name.rpartition('/')[2]}",
        f"[AnyUp]({PAPER}): upsamples the features of a vision encoder to any resolution, guided by the image.",
        f'```python\nimport anyup_jax  # or anyup_torch\n\nmodel = anyup_jax.from_pretrained("{name}")\n```',
        "## Configuration",
        table(("field", "value"), fields.items()),
        *(_run_parts(run) if run is not None else ()),
        *(("## Licence", f"{licence}") if licence else ()),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Any) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(x) for x in line)} |" for line in lines)


def _cell(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return " ".join(shown.split()).replace("|", r"\|")


def _run_parts(run: Path) -> Iterator[str]:
    """Yield the sections on a run."""
    step = run_directory.step_directory(run)
    if step is None:
        raise ValueError(f"run={str(run)!r} is no run of train.run: it has no checkpoints/STEP/.")
    root = step.parent.parent if step.parent.name == run_directory.CHECKPOINTS else step.parent
    record = step / "config" / "metadata"
    settings = run_directory.parse_json(record.read_bytes(), str(record)) if record.is_file() else {}
    if data := _settings(settings, DATA):
        yield "## Data"
        yield table(("setting", "value"), data.items())
        if "dataset.mean" in data:
            yield "The guidance is all bands, each minus its `dataset.mean` and divided by its `dataset.std`."
    yield "## Training"
    yield f"{int(step.name):,} steps of `python -m train.run`."
    if recipe := _settings(settings, RECIPE):
        yield table(("setting", "value"), recipe.items())
    if curve := _curve(root / "metrics.jsonl", int(step.name)):
        names = [name for name in dict.fromkeys(key for line in curve for key in line) if name not in NOT_SCALARS]
        yield "## Curve"
        yield "Means since the line before, as the run wrote them; some of its lines."
        yield table(("step", *names), ([str(line["step"]), *(line.get(name, "") for name in names)] for line in curve))
    for path in (root / "results.json", *sorted(root.glob("*/results.json"))):
        yield from _scores(path)


def _settings(settings: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """Return the settings of some groups by their names with dots, without those of the machine and empty ones."""
    chosen = flat({group: settings[group] for group in groups if group in settings})
    return {name: value for name, value in chosen.items() if name.rpartition(".")[2] not in LOCAL and value is not None}


def _curve(path: Path, last: int) -> list[dict[str, Any]]:
    """Return at most ROWS lines of the metrics, evenly spread, up to the step `last`; damaged ones are left out."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            if isinstance(values, dict) and int(values["step"]) <= last:
                lines.append(values)
        except (ValueError, KeyError, TypeError):
            continue
    if len(lines) <= ROWS:
        return lines
    return [lines[round(i * (len(lines) - 1) / (ROWS - 1))] for i in range(ROWS)]


def _scores(path: Path) -> Iterator[str]:
    """Yield the scores that an evaluation wrote into the run's folder, or into a folder within; nothing else counts."""
    try:
        results = json.loads(path.read_bytes())
        names = list(dict.fromkeys(name for result in results for name in result["scores"]))
        rows = [
            [result["encoder"], result["method"], *(result["scores"].get(name, "") for name in names)]
            for result in results
        ]
        task = results[0]["settings"]["task"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return
    yield f"## Scores: {task}"
    yield table(("encoder", "method", *names), rows)
