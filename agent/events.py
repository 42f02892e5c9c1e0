"""The event stream to the host: JSON lines of at most 16 KiB on the virtio-serial port.

The stream never disturbs the run: a port that is absent, busy or not read costs a bounded wait at most, and
what was lost is counted and told with the next event that gets through. Lines are pure ASCII (everything
else is escaped), so no control character can reach the wire; text that had to be cut is marked.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import sys
import threading
import time
from pathlib import Path
from typing import Final, Literal

Kind = Literal["start", "thought", "action", "result", "format-error", "note", "error", "finish", "end"]

VERSION: Final = 1
MAX_LINE: Final = 16384  # bytes, the newline included
CUT: Final = "...[truncated]"
DEFAULT_PORT: Final = Path("/dev/virtio-ports/org.hotcell.events")
WRITE_S: Final = 5.0  # seconds to wait for a host that does not read
MAX_KEYS: Final = 30  # of data; the host takes 32 and "lost" and "truncated" may come on top
MAX_KEY: Final = 64  # characters
_LADDER: Final = (8000, 4000, 2000, 1000, 500, 200, 100)  # characters a string may keep, tried in turn

Scalar = str | int | float | bool | None


def encode(kind: Kind, step: int, text: str, data: dict[str, object]) -> bytes:
    """One event as a line of at most ``MAX_LINE`` bytes; strings are cut as far as that needs.

    The host takes flat data only: a nested value becomes its JSON text.
    """
    line = b""
    for keep in _LADDER:
        short = {key[:MAX_KEY]: _scalar(data[key], keep) for key in list(data)[:MAX_KEYS]}
        record = {"v": VERSION, "kind": kind, "step": step, "text": _cut(text, keep), "data": short}
        if any(_is_cut(v) for v in (record["text"], *short.values())) or len(short) < len(data):
            short["truncated"] = True
        line = json.dumps(record, ensure_ascii=True).encode("ascii") + b"\n"
        if len(line) <= MAX_LINE:
            return line
    bare = {"v": VERSION, "kind": kind, "step": step, "text": _cut(text, 100), "data": {"truncated": True}}
    return json.dumps(bare, ensure_ascii=True).encode("ascii") + b"\n"


def _scalar(value: object, keep: int) -> Scalar:
    """``value`` if JSON has it as a scalar, else as text of at most ``keep`` characters."""
    if value is None or isinstance(value, bool):
        return value
    if (isinstance(value, int) and abs(value) < 2**53) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _cut(value if isinstance(value, str) else json.dumps(value, default=str), keep)


def _cut(text: str, keep: int) -> str:
    """At most ``keep`` characters and the mark; half a surrogate pair becomes a question mark."""
    whole = text[: keep + 1].encode("utf-8", errors="replace").decode()
    return whole if len(text) <= keep else whole[:keep] + CUT


def _is_cut(value: object) -> bool:
    return isinstance(value, str) and value.endswith(CUT)


class Events:
    """Writes events to ``port`` (None: to nowhere) and a short line for each to stderr. Thread-safe."""

    def __init__(self, port: Path | None, write_s: float = WRITE_S) -> None:
        self._port = port
        self._write_s = write_s
        self._fd: int | None = None
        self._lost = 0
        self._torn = False
        self._lock = threading.Lock()

    @property
    def lost(self) -> int:
        """Events that did not get through since the last one that did."""
        return self._lost

    def emit(self, kind: Kind, step: int = 0, text: str = "", data: dict[str, object] | None = None) -> None:
        """Send one event. Never raises for anything the outside does."""
        with self._lock:
            self._log(kind, step, text)
            if self._port is None:
                return
            told: dict[str, object] = {"lost": self._lost} if self._lost else {}
            told.update(data or {})
            if self._send(encode(kind, step, text, told)):
                self._lost = 0
            else:
                self._lost += 1

    def close(self) -> None:
        """Let go of the port."""
        with self._lock:
            self._drop()

    def _log(self, kind: Kind, step: int, text: str) -> None:
        short = json.dumps(text[:200])
        with contextlib.suppress(OSError, ValueError):
            print(f"event kind={kind} step={step} text={short}", file=sys.stderr, flush=True)

    def _send(self, line: bytes) -> bool:
        """True if the whole line was written."""
        if self._port is None:
            return False
        if self._torn:
            line = b"\n" + line  # end the torn line first, so that only that one is spoilt
        # After a loss the host is taken to be away, and only a moment is spent on each event.
        deadline = time.monotonic() + (min(self._write_s, 0.1) if self._lost else self._write_s)
        rest = line
        try:
            if self._fd is None:
                self._fd = _open(self._port)
            while rest:
                written = self._write(rest, deadline)
                rest = rest[written:]
        except OSError:
            self._torn = self._torn or 0 < len(rest) < len(line)
            self._drop()
            return False
        self._torn = False
        return True

    def _write(self, rest: bytes, deadline: float) -> int:
        if self._fd is None:
            raise OSError("closed")
        while True:
            try:
                return os.write(self._fd, rest)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                # A port whose host end is gone polls as hung up at once; the sleep keeps that from spinning.
                select.select([], [self._fd], [], min(left, 0.2))
                time.sleep(0.02)

    def _drop(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


def _open(port: Path) -> int:
    """The port for writing, without ever waiting for a reader. A path that is absent stays absent."""
    return os.open(port, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
