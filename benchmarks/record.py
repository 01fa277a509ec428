"""Tables as JSON, and their ratios compared: `python -m benchmarks.record RATIOS.json NEW.json [--keep]`.

Seconds are of a machine and of a day; ratios of two things that were measured in one run are what can be compared. They
stand in the columns whose name has a slash.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

from rich.table import Table

from anyup_torch.threads import processors

PACKAGES = ("jax", "jaxlib", "flax", "torch", "numpy", "onnxruntime")
TOLERANCE = 1.25  # the factor by which a ratio may change

Ratios = dict[str, dict[str, dict[str, float]]]
"""Names of tables -> of rows -> of columns -> values."""


def machine() -> dict[str, Any]:
    """Return what the figures depend on beside the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return dict(
        processor=model or platform.processor(),
        processors=processors(),
        system=platform.platform(),
        python=platform.python_version(),
        packages=versions,
        date=datetime.date.today().isoformat(),
    )


def as_json(table: Table) -> dict[str, Any]:
    """Return a table as it is printed: title, caption, names of the columns, and the rows' texts."""
    columns = [str(column.header) for column in table.columns]
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns))
    texts = dict(title=str(table.title), caption=str(table.caption or ""))
    return dict(**texts, columns=columns, rows=[list(row) for row in rows])


def ratios(record: dict[str, Any]) -> Ratios:
    """Return the ratios of a record that `benchmarks.run --json` wrote."""
    found: Ratios = {}
    for name, table in record["tables"].items():
        wanted = [index for index, column in enumerate(table["columns"]) if "/" in column]
        for row in table["rows"]:
            numbers = {table["columns"][i]: float(row[i]) for i in wanted if re.fullmatch(r"-?\d+(\.\d+)?", row[i])}
            if numbers:
                found.setdefault(name, {})[row[0]] = numbers
    return found


def compare(old: Ratios, new: Ratios) -> list[tuple[str, str, str, float, float]]:
    """Return (table, row, column, before, after) of every ratio in both that changed by more than `TOLERANCE`."""
    changed = []
    for table, row, column in ((t, r, c) for t in old for r in old[t] for c in old[t][r]):
        before, after = old[table][row][column], new.get(table, {}).get(row, {}).get(column)
        if after is not None and not (before / TOLERANCE <= after <= before * TOLERANCE):
            changed.append((table, row, column, before, after))
    return changed


def main(argv: list[str] | None = None) -> int:
    """Print the ratios that changed; return 1 if any did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description="compare ratios")
    parser.add_argument("ratios", type=Path, metavar="RATIOS.json", help="what was kept before")
    parser.add_argument("new", type=Path, metavar="NEW.json", help="what `benchmarks.run --json` wrote")
    parser.add_argument("--keep", action="store_true", help="keep the new ratios in place of those of the same tables")
    args = parser.parse_args(argv)
    old: Ratios = json.loads(args.ratios.read_text()) if args.ratios.exists() else {}
    new = ratios(json.loads(args.new.read_text()))
    changed = compare(old, new)
    for table, row, column, before, after in changed:
        print(f"{table}: {row}, {column}: {before:g} before, {after:g} now")
    compared = sum(len(row) for name in old.keys() & new.keys() for row in old[name].values())
    print(f"{len(changed)} of {compared} ratios changed by more than {TOLERANCE - 1:.0%}.")
    if args.keep:
        args.ratios.write_text(json.dumps({**old, **new}, indent=1, sort_keys=True) + "\n")
    return int(bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
