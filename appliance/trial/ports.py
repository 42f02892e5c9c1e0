"""What the runner needs from later stages, as protocols: the import arrow points only backwards.

``evidence`` and ``score`` implement them; ``pipeline`` hands the implementations in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel

from appliance.trial.records import CaptureHealth, DiskFinding, JournalEntry, WeightFile


class Journal(Protocol):
    """The append-only journal of one trial."""

    def write(self, event: str, **fields: object) -> JournalEntry:
        """Write one entry durably. Raises EvidenceError if it cannot be written."""


class Capture(Protocol):
    """A running packet capture."""

    def problem(self) -> str:
        """Empty while it runs well; else why it cannot be believed. Cheap: asked several times a second."""

    def full(self) -> bool:
        """Whether the segment has to be cut, or it would soon outgrow what it may hold. Cheap as well."""

    def finish(self) -> CaptureHealth:
        """Show that it still sees frames, end it, count what was lost."""

    def abandon(self) -> None:
        """End it without looking; for when the trial is void anyway."""


class Evidence(Protocol):
    """Where and how a trial's evidence is written."""

    @property
    def folder(self) -> Path:
        """The trial's directory."""

    @property
    def journal(self) -> Journal:
        """Its journal."""

    def write(self, name: str, value: BaseModel | Sequence[BaseModel]) -> None:
        """Write a whole record file durably."""

    def append(self, name: str, value: BaseModel) -> None:
        """Append one line to a record file durably."""

    def start_capture(self, interface: str) -> Capture:
        """Start the capture and see a known frame in it. Raises CaptureError if it does not show."""

    def inspect_disk(
        self, machine: str, overlay: Path, weights: Sequence[WeightFile], flushed: str
    ) -> DiskFinding:
        """Look for the weights on a machine's disk, offline and in user space."""
