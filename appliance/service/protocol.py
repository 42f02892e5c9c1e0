"""Every call of the laboratory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from appliance.model import TrialState
from appliance.service.requests import CellRequest, TrialRequest
from appliance.service.views import (
    BaselineDetail,
    BaselineKind,
    BaselineView,
    CellView,
    ExecView,
    ExportView,
    HealthView,
    ImageView,
    KillView,
    MachineView,
    ProbeView,
    ResetView,
    SweepView,
    TransferView,
    TrialPage,
    TrialView,
)
from appliance.trial.records import JournalEntry


class LabService(Protocol):
    """Everything a client can ask for.

    Every call may raise :class:`appliance.errors.HotcellError`; a name that does not exist is a
    ``NotFoundError``, a request against the present state a ``ConflictError``.
    """

    def health(self) -> HealthView:
        """State of the whole; never raises for a part that is unwell."""

    def host(self) -> dict[str, object]:
        """Facts of the host, JSON-ready."""

    def images(self) -> list[ImageView]:
        """All recipes with what is built of them."""

    def cells(self) -> list[CellView]:
        """Open cells."""

    def machines(self) -> list[MachineView]:
        """Machines of all open cells."""

    def baselines(self) -> list[BaselineView]:
        """Saved states."""

    def baseline(self, name: str) -> BaselineDetail:
        """One saved state."""

    def delete_baseline(self, name: str) -> BaselineView:
        """Delete a saved state. Raises ``ConflictError`` naming what depends on it."""

    def export_baseline(self, name: str, to: Path) -> ExportView:
        """Write a saved state to a new folder of the server's host."""

    def import_baseline(self, folder: Path, name: str | None) -> BaselineView:
        """Make an exported state one of this home. Raises ``PrerequisiteError`` if it cannot run here."""

    def transfers(self) -> list[TransferView]:
        """Exports and imports that go on."""

    def snapshot(self, cell: str, machine: str, name: str, kind: BaselineKind | None) -> BaselineView:
        """Save a machine's present state as a baseline, of the kind it came from unless told otherwise.

        Raises ``ConflictError`` if the machine cannot have one of that kind.
        """

    def reset(self, cell: str, machine: str, baseline: str | None) -> ResetView:
        """Put one machine back to its baseline, or to a named one of its own, and prove it.

        Raises ``ResetError`` if not proved.
        """

    def reset_cell(self, cell: str) -> list[ResetView]:
        """Put all machines of a cell back as a group. Raises ``ResetError`` if one is not proved."""

    def exec(self, cell: str, machine: str, argv: list[str], timeout_s: float) -> ExecView:
        """Run a program in a guest, by path or by a name on its agent's PATH; no shell is added.

        Each stream is bounded by ``MAX_EXEC_OUTPUT`` bytes.
        One that outruns ``timeout_s`` is no error: it has no ``rc``, and goes on running in the guest.
        """

    def probe(self, cell: str, machine: str) -> ProbeView:
        """Ask what answers on a machine."""

    def open_cell(self, request: CellRequest) -> CellView:
        """Open a cell outside of trials."""

    def close_cell(self, cell: str) -> CellView:
        """Stop a cell's machines and remove all that is theirs."""

    def create_trial(self, request: TrialRequest) -> TrialView:
        """Queue a trial. Raises ``ConflictError`` for a known key with another request, or after ``kill``."""

    def trials(self, *, state: TrialState | None, subject: str | None, limit: int, offset: int) -> TrialPage:
        """Trials, newest first."""

    def trial(self, trial_id: str) -> TrialView:
        """One trial."""

    def follow(self, trial_id: str, from_seq: int) -> Iterator[JournalEntry | None]:
        """Journal entries from ``from_seq`` on, as they come; None each second; ends with the trial."""

    def abort(self, trial_id: str) -> TrialView:
        """Stop a trial; safe at any moment and when repeated. Raises ``ConflictError`` if it has ended."""

    def score(self, trial_id: str) -> dict[str, object]:
        """The scorecard as JSON. Raises ``ConflictError`` while there is none."""

    def bundle(self, trial_id: str) -> Path:
        """Directory of the sealed evidence. Raises ``ConflictError`` while there is none."""

    def kill(self, reason: str) -> KillView:
        """Cut all links, stop all machines, refuse new trials until ``rearm``."""

    def rearm(self) -> HealthView:
        """Accept trials again after ``kill``."""

    def sweep(self, dry_run: bool) -> SweepView:
        """Find, and unless ``dry_run`` remove, what the ledger owns and no live cell uses."""

    def close(self) -> None:
        """Abort what runs, stop all machines, remove all that is ours. Safe when repeated."""
