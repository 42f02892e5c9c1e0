"""Log lines of the form ``event key=value``, one line each, with the trial they belong to.

Values may come from a guest, so whatever is not printable is escaped and long values are cut: a line of
the log can neither forge another nor steer a terminal.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_MAX_VALUE = 300
_PLAIN = re.compile(r"[\w.:/@%+,-]+", re.ASCII)
_current: ContextVar[str] = ContextVar("hotcell_trial", default="")


@contextmanager
def trial(identifier: str) -> Iterator[None]:
    """Mark every line logged in this block (and in tasks started in it) with a trial's id."""
    token = _current.set(identifier)
    try:
        yield
    finally:
        _current.reset(token)


def value(thing: object) -> str:
    """One value as ASCII: plain if it is one word, else quoted and escaped; at most 300 characters of it."""
    text = f"{thing:.3f}" if isinstance(thing, float) else str(thing)
    cut = text[:_MAX_VALUE]
    shown = cut if _PLAIN.fullmatch(cut) else '"' + ascii(cut)[1:-1].replace('"', '\\"') + '"'
    return shown + (f"...+{len(text) - _MAX_VALUE}" if len(text) > _MAX_VALUE else "")


def line(event: str, fields: dict[str, object]) -> str:
    """``event key=value key=value``."""
    return " ".join([event, *(f"{k}={value(v)}" for k, v in fields.items())])


class Log:
    """A named logger with one method a level. ``event`` is a fixed word; all else goes into the fields."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def _log(self, level: int, event: str, fields: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", line(event, fields))

    def debug(self, event: str, **fields: object) -> None:
        """Detail for whoever debugs the appliance."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """A step that an operator follows."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Something works less well than it should."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Something failed."""
        self._log(logging.ERROR, event, fields)


class _Formatter(logging.Formatter):
    """Adds the trial; escapes what other libraries log, and keeps tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S%z')} {record.levelname.lower()} {record.name}"
        mark = _current.get()
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in record.getMessage())
        text = f"{head}{f' trial={mark}' if mark else ''} {message}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up(level: str = "INFO") -> None:
    """Send the package's log to standard error. Called once, by the program's entry."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
