"""Evidence in memory: what a runner wrote, in which order, with failures on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel

from appliance.errors import CaptureError, EvidenceError
from appliance.trial.records import CaptureHealth, DiskFinding, JournalEntry, WeightFile


class MemoryJournal:
    """Entries in a list. ``on_write`` is called first and may raise."""

    def __init__(self) -> None:
        self.entries: list[JournalEntry] = []
        self.on_write: Callable[[str], None] = lambda _event: None
        self._lock = threading.Lock()

    def write(self, event: str, **fields: object) -> JournalEntry:
        self.on_write(event)
        with self._lock:
            entry = JournalEntry(seq=len(self.entries), at=time.time(), event=event, fields=fields)
            self.entries.append(entry)
            return entry

    @property
    def events(self) -> list[str]:
        """The entries' names, in order."""
        return [e.event for e in self.entries]

    def of(self, event: str) -> list[dict[str, object]]:
        """Fields of every entry of that name."""
        return [e.fields for e in self.entries if e.event == event]


class FakeCapture:
    """Counts how it ended."""

    def __init__(self, *, healthy: bool = True) -> None:
        self.finished = 0
        self.abandoned = 0
        self.trouble = ""
        self.is_full = False
        self._healthy = healthy

    def problem(self) -> str:
        return "tcpdump ended early" if self.finished + self.abandoned else self.trouble

    def full(self) -> bool:
        return self.is_full

    def finish(self) -> CaptureHealth:
        self.finished += 1
        if not self._healthy:
            raise CaptureError("the capture does not show the known frame")
        return CaptureHealth(first_seen=True, last_seen=True, packets=7, dropped=0, started=1.0, ended=2.0)

    def abandon(self) -> None:
        self.abandoned += 1


class FakeEvidence:
    """Implements ``appliance.trial.ports.Evidence``. ``refuse`` names what cannot be written or done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = MemoryJournal()
        self.capture = FakeCapture()
        self.refuse: set[str] = set()
        self.written: dict[str, BaseModel | Sequence[BaseModel]] = {}
        self.lines: dict[str, list[BaseModel]] = {}
        self.inspected: list[tuple[str, str]] = []

    def _do(self, what: str) -> None:
        if what in self.refuse:
            raise EvidenceError(f"{what} cannot be written: refused by the test")

    def write(self, name: str, value: BaseModel | Sequence[BaseModel]) -> None:
        self._do(name)
        self.written[name] = value

    def append(self, name: str, value: BaseModel) -> None:
        self._do(name)
        self.lines.setdefault(name, []).append(value)

    def start_capture(self, interface: str) -> FakeCapture:
        if "capture" in self.refuse:
            raise CaptureError(f"nothing is seen on {interface}: refused by the test")
        return self.capture

    def inspect_disk(
        self, machine: str, overlay: Path, weights: Sequence[WeightFile], flushed: str
    ) -> DiskFinding:
        self._do("disk")
        self.inspected.append((machine, flushed))
        return DiskFinding.model_validate(
            {"machine": machine, "flushed": flushed, "examined": 3, "weights": (), "problem": ""}
        )
