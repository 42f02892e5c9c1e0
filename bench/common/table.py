"""Tables as Markdown, so that what a run printed is what the documentation shows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 160


def show(columns: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: int = 1) -> None:
    """Print a table; the first ``text_columns`` are aligned left, the rest right."""
    table = Table(box=box.MARKDOWN)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < text_columns else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(file=sys.stdout, width=_WIDTH, highlight=False, markup=False).print(table)


def seconds(value: float | None) -> str:
    """Seconds for a table: milliseconds where they matter, a dash for none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
