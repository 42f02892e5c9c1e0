"""The agent's event stream: lines from a hostile guest, bounded and schema-checked before anyone reads them.

A line that no honest agent sends is counted and described, never stored as it came.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from appliance.config.specs import MAX_STEPS
from appliance.errors import GuestChannelError
from appliance.model import printable

MAX_LINE = 16 * 1024
MAX_TAMPERING = 100
_A_STEP = 3  # thought, action, and result or finish
# start, end, a note or an error, and what a step has more: format errors, of which a run may have 20.
_BESIDES = 100
_LEAST_BYTES = 64 << 20
# Lines that are no events. Reading 64 MiB of empty ones takes a minute of a core, of broken ones six minutes.
_OTHER_LINES = 10_000


def most_events(steps: int) -> int:
    """How many events of a run of at most ``steps`` steps are taken; an honest agent sends fewer."""
    return _A_STEP * steps + _BESIDES


def most_bytes(steps: int) -> int:
    """How many bytes of such a run are read: room for as many lines of full length, or 64 MiB."""
    return max(_LEAST_BYTES, most_events(steps) * MAX_LINE)


class Kind(StrEnum):
    """What an agent reports."""

    START = "start"
    THOUGHT = "thought"
    ACTION = "action"
    RESULT = "result"
    FORMAT_ERROR = "format-error"
    NOTE = "note"
    ERROR = "error"
    FINISH = "finish"
    END = "end"


_Int = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
_Float = Annotated[float, Field(allow_inf_nan=False)]
Scalar = Annotated[str, StringConstraints(max_length=8192)] | _Int | _Float | bool | None


class Event(BaseModel):
    """One line of the stream."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    v: Literal[1]
    kind: Annotated[Kind, Field(strict=False)]
    step: int = Field(ge=0, le=1_000_000)
    text: str = Field(max_length=MAX_LINE)
    data: dict[Annotated[str, StringConstraints(max_length=64)], Scalar] = Field(max_length=32)


class LineSplitter:
    """Bytes in, lines out; a line over ``MAX_LINE`` becomes one ``None`` however long it is."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes | None]:
        """The lines that ``data`` completes; ``None`` stands for one that was too long to keep."""
        lines: list[bytes | None] = []
        for i, piece in enumerate(data.split(b"\n")):
            if i > 0:
                lines.append(None if self._skipping else bytes(self._buffer))
                self._buffer.clear()
                self._skipping = False
            if not self._skipping:
                self._buffer += piece
                if len(self._buffer) > MAX_LINE:
                    self._buffer.clear()
                    self._skipping = True
        return lines


def parse(line: bytes) -> Event:
    """One line as an event.

    Raises:
        ValueError: not UTF-8, not JSON, or not of the schema; the message is printable and short.
    """
    try:
        value = json.loads(line.decode())
        return Event.model_validate(value)
    except ValidationError as e:
        first = e.errors()[0]
        where = printable(".".join(map(str, first["loc"])), 60)
        raise ValueError(f"{where}: {printable(first['msg'], 120)}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not a JSON object: {printable(line[:60].decode(errors='replace'), 60)}") from e


class EventStream:
    """Reads one machine's event port in a thread; never blocks and never trusts.

    ``on_event`` gets each valid event, ``on_tamper`` a printable description of each that is not
    (at most ``MAX_TAMPERING`` of them, then one last word). Each event is written durably, so the run's limit
    of ``steps`` bounds how many are taken.

    Raises:
        GuestChannelError: the port cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        on_event: Callable[[Event], None],
        on_tamper: Callable[[str], None],
        steps: int = MAX_STEPS,
    ) -> None:
        self._on_event = on_event
        self._on_tamper = on_tamper
        self._most_events, self._most_bytes = most_events(steps), most_bytes(steps)
        self._most_lines = self._most_events + _OTHER_LINES
        self._tampering = 0
        self._events = 0
        self._closed = False
        self._delivering = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(5)
        try:
            self._socket.connect(str(path))
        except OSError as e:
            self._socket.close()
            raise GuestChannelError(f"the event port {path} cannot be opened: {e}") from e
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._read, name=f"events-{path.parent.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading. What has arrived is delivered, for 5 s at most; nothing comes after this returns."""
        with contextlib.suppress(OSError):  # the machine has gone first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        with self._delivering:
            self._closed = True
        self._socket.close()

    def _read(self) -> None:
        splitter, total, count = LineSplitter(), 0, 0
        while True:
            try:
                data = self._socket.recv(65536)
            except OSError:
                return
            if not data:
                return
            total += len(data)
            lines = splitter.feed(data)
            for line in lines[: self._most_lines - count]:
                with self._delivering:
                    if self._closed:
                        return
                    self._deliver(line)
            count += len(lines)
            if count > self._most_lines or total > self._most_bytes:
                with self._delivering:
                    if not self._closed:
                        self._tamper(
                            "more lines or bytes than a run of this length has; the rest was not read"
                        )
                return

    def _deliver(self, line: bytes | None) -> None:
        if line is None:
            self._tamper(f"a line longer than {MAX_LINE} bytes")
            return
        if not line.strip():
            return
        try:
            event = parse(line)
        except ValueError as e:
            self._tamper(str(e))
            return
        self._events += 1
        if self._events <= self._most_events:
            self._on_event(event)
        elif self._events == self._most_events + 1:
            self._tamper(f"more than {self._most_events} events; the rest is not recorded")

    def _tamper(self, what: str) -> None:
        self._tampering += 1
        if self._tampering < MAX_TAMPERING:
            self._on_tamper(what)
        elif self._tampering == MAX_TAMPERING:
            self._on_tamper("more such lines follow; they are not recorded")
