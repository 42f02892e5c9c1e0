"""What all verbs share: global options, output, and how errors become exit codes."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from appliance.errors import Blame, ConfigError, HotcellError
from appliance.host.paths import Paths
from appliance.model import printable

OTHER, USER, HOST, LAB, INTERRUPTED = 1, 2, 3, 4, 130
_CODES = {Blame.USER: USER, Blame.HOST: HOST, Blame.LAB: LAB, Blame.SUBJECT: OTHER}

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
Cell = Annotated[str, typer.Argument(metavar="CELL", help="Cell; `hotcell cells` lists them.")]
Machine = Annotated[str, typer.Argument(metavar="MACHINE", help="Machine in the cell, such as target-1.")]
Trial = Annotated[str, typer.Argument(metavar="TRIAL", help="Trial id, or `last` for the newest.")]


@dataclass(frozen=True)
class Options:
    """The global options. ``config`` is what --config named; without it the settings find their own file."""

    paths: Paths
    config: Path | None
    server: str | None
    token_file: Path | None


def options(ctx: typer.Context) -> Options:
    """The global options of this call."""
    return cast("Options", ctx.obj)


def called_as(argv0: str, here: Path, found: str | None) -> str:
    """How to call this program again from the folder ``here``, for a shell. Pure.

    ``found`` is what the bare name means to the shell, None if nothing. A file below ``here`` is named by its
    way from there, and ``python -m`` by the interpreter that runs it.
    """
    if Path(argv0).name == "__main__.py":
        return f"{_short(Path(sys.executable), here)} -m appliance.cli"
    program = Path(argv0)
    if found is not None and Path(found) == here / program:
        return shlex.quote(program.name)
    return _short(here / program, here)


def _short(path: Path, here: Path) -> str:
    inside = path.is_relative_to(here) and len(path.relative_to(here).parts) > 1
    return shlex.quote(os.fspath(path.relative_to(here) if inside else path))


def exit_code(error: HotcellError) -> int:
    """2 user, 3 host, 4 lab, 1 anything else."""
    return _CODES[error.blame]


def say_error(error: HotcellError) -> None:
    """Two lines on stderr: what is wrong and what to do."""
    note(f"error: {clean(error.message)}")
    if error.hint:
        note(f"what to do: {clean(error.hint)}")


def clean(text: str, limit: int = 4000) -> str:
    """Text for a terminal: line breaks stay, other control characters do not, and it is bounded."""
    return "\n".join(printable(line, limit) for line in text[:limit].replace("\t", "    ").split("\n"))


def out(text: str) -> None:
    """A line of the result, on stdout."""
    print(text, flush=True)


def note(text: str) -> None:
    """A line about the work, on stderr."""
    print(text, file=sys.stderr, flush=True)


def out_json(value: object) -> None:
    """A result for programs. Escaped to ASCII, so that guest text cannot drive a terminal."""
    out(json.dumps(value, indent=2, ensure_ascii=True))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned with spaces; ``-`` for what is missing."""
    cells = [list(head), *([_cell(v) for v in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(str(value), 120)


def show(
    as_json: bool, data: object, head: Sequence[str], rows: Sequence[Sequence[object]], empty: str
) -> None:
    """A list as JSON or as a table."""
    if as_json:
        out_json(data)
    elif rows:
        out(table(head, rows))
    else:
        out(empty)


def pairs(values: Sequence[str], allowed: Sequence[str], option: str) -> dict[str, str]:
    """``key=value`` options as a dict.

    Raises:
        ConfigError: one is not of that form, is repeated, or has an unknown key.
    """
    found: dict[str, str] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or key not in allowed or key in found:
            what = "is given twice" if key in found else "is not KEY=VALUE with a known KEY"
            raise ConfigError(f"{option} {text!r} {what}", hint=f"known keys: {', '.join(allowed)}")
        found[key] = value
    return found


class Reporter:
    """Progress on stderr: on a terminal a spinner below the lines, elsewhere lines only."""

    def __init__(self, status: Any | None) -> None:
        self._status = status

    def line(self, text: str) -> None:
        """Something happened."""
        if self._status is None:
            note(text)
        else:
            self._status.console.print(text, markup=False, highlight=False)

    def now(self, text: str) -> None:
        """What is going on; shown on a terminal only."""
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(text))


@contextmanager
def reporter(text: str) -> Iterator[Reporter]:
    """A reporter for the length of a block."""
    if not sys.stderr.isatty():
        yield Reporter(None)
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(text)) as status:
        yield Reporter(status)
