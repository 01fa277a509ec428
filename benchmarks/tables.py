"""How the tables look."""

from __future__ import annotations

from rich.table import Table


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", min_width=len(title))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
