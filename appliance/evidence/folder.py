"""The directory of one open trial: everything the runner writes goes through here.

Implements :class:`appliance.trial.ports.Evidence` structurally; the runner knows only the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pydantic import BaseModel

from appliance.cell.ledger import Ledger
from appliance.evidence.capture import Capture
from appliance.evidence.disk import Flushed, find_weights
from appliance.evidence.journal import Journal, append_record, write_record
from appliance.trial import records
from appliance.trial.records import DiskFinding, WeightFile


class TrialFolder:
    """Evidence of one trial while it is open."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.folder = folder
        self._ledger = ledger
        self.journal = Journal(folder / records.JOURNAL)

    def write(self, name: str, value: BaseModel | Sequence[BaseModel]) -> None:
        """Write a whole record file durably."""
        write_record(self.folder / name, value)

    def append(self, name: str, value: BaseModel) -> None:
        """Append one line to a record file durably."""
        append_record(self.folder / name, value)

    def start_capture(self, interface: str) -> Capture:
        """Start the capture and see a known frame in it."""
        return Capture(interface, self.folder / records.CAPTURE, self._ledger, owner=self.folder.name).start()

    def inspect_disk(
        self, machine: str, overlay: Path, weights: Sequence[WeightFile], flushed: str
    ) -> DiskFinding:
        """Look for the weights on a machine's disk, offline and in user space."""
        return find_weights(overlay, weights, machine=machine, flushed=cast("Flushed", flushed))

    def close(self) -> None:
        """No more entries; the folder is ready to be sealed."""
        self.journal.close()
