"""The laboratory: what clients can ask for, carried out. Implements :class:`appliance.service.LabService`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from appliance import __version__
from appliance.build import find_image, list_recipes
from appliance.cell.cell import Cell
from appliance.cell.warden import Warden
from appliance.config import HostSettings, Library
from appliance.errors import ConflictError, HotcellError
from appliance.host.capacity import host_capacity, own_footprint
from appliance.model import TrialState
from appliance.pipeline import views
from appliance.pipeline.archive import Archive
from appliance.pipeline.baselines import BaselineDesk
from appliance.pipeline.cells import CellDesk
from appliance.pipeline.conduct import Bench
from appliance.pipeline.following import follow, seldom
from appliance.pipeline.grants import Grants
from appliance.pipeline.process import seal_facts
from appliance.pipeline.switches import Switches
from appliance.pipeline.trials import TrialDesk
from appliance.service import (
    BaselineDetail,
    BaselineKind,
    BaselineView,
    CellRequest,
    CellView,
    ExecView,
    ExportView,
    FootprintView,
    HealthView,
    ImageView,
    KillView,
    MachineView,
    ProbeView,
    ResetView,
    SealView,
    SweepView,
    TransferView,
    TrialPage,
    TrialRequest,
    TrialView,
)
from appliance.store import queries
from appliance.trial import records
from appliance.trial.records import JournalEntry


class Lab:
    """One laboratory in one sealed process. Every call may come from any thread."""

    def __init__(
        self, bench: Bench, settings: HostSettings, library: Library, warden: Warden, cells: dict[str, Cell]
    ) -> None:
        self._bench = bench
        self._archive = Archive(bench.store, bench.paths)
        self._warden = warden
        self._cells = cells
        self._began = time.monotonic()
        grants = Grants(settings.guests, lambda: host_capacity(bench.paths.home), cells, bench.standbys)
        self.room_for_standby = grants.room_for_standby
        self._trials = TrialDesk(bench, settings, library, cells, grants)
        self._desk = CellDesk(bench, settings, library, cells, self._trials, grants)
        self._baselines = BaselineDesk(bench)
        self._switches = Switches(bench, warden, self._trials, self._desk)
        self._lock = threading.Lock()
        self._closed = False

    # -- looking --------------------------------------------------------------------------------------

    def health(self) -> HealthView:
        """State of the whole."""
        try:
            facts = seal_facts(self._bench.known_links)
            broken = "; ".join(f"{f.name}: {f.found}" for f in facts if not f.passed)
        except HotcellError as e:
            broken = e.message
        own = own_footprint()
        running, queue, why = self._trials.load()
        return HealthView(
            ok=not broken and self._warden.alive and self._trials.accepting, version=__version__,
            uptime_s=time.monotonic() - self._began, accelerator=self._bench.shop.accelerator,
            seal=SealView(sealed=not broken, detail=broken or "own namespace; loopback, bridges, taps"),
            warden=self._warden.alive, accepting=self._trials.accepting, trials_running=running,
            queue=queue, waiting=why, footprint=FootprintView(rss=own.rss, cpu_s=own.cpu_s),
        )  # fmt: skip

    def host(self) -> dict[str, object]:
        """Capacity, versions, accelerator."""
        own = own_footprint()
        return {
            "capacity": host_capacity(self._bench.paths.home).model_dump(mode="json"),
            "versions": self._bench.shop.libvirt.versions(),
            "accelerator": self._bench.shop.accelerator.value,
            "server": own.model_dump(mode="json"),
            "pid": os.getpid(),
            "warden_pid": self._warden.pid,
        }

    def images(self) -> list[ImageView]:
        """All recipes and what is built of them."""
        return [views.image_view(r, find_image(r, self._bench.paths)) for r in list_recipes()]

    def cells(self) -> list[CellView]:
        """Open cells."""
        return self._desk.views()

    def machines(self) -> list[MachineView]:
        """Machines of all open cells."""
        return self._desk.machines()

    def baselines(self) -> list[BaselineView]:
        """Saved states."""
        return self._baselines.views()

    def baseline(self, name: str) -> BaselineDetail:
        """One saved state."""
        return self._baselines.show(name)

    def delete_baseline(self, name: str) -> BaselineView:
        """Delete a saved state that nothing depends on."""
        return self._baselines.delete(name)

    def export_baseline(self, name: str, to: Path) -> ExportView:
        """Write a saved state to a new folder of this host."""
        return self._baselines.export(name, to)

    def import_baseline(self, folder: Path, name: str | None) -> BaselineView:
        """Make an exported state one of this home."""
        return self._baselines.import_(folder, name)

    def transfers(self) -> list[TransferView]:
        """Exports and imports that go on."""
        return self._baselines.transfers()

    # -- cells opened by hand -------------------------------------------------------------------------

    def open_cell(self, request: CellRequest) -> CellView:
        """A cell outside of trials."""
        return self._desk.open(request)

    def close_cell(self, cell: str) -> CellView:
        """Stop a cell's machines and remove all that is theirs."""
        return self._desk.close(cell)

    def snapshot(self, cell: str, machine: str, name: str, kind: BaselineKind | None = None) -> BaselineView:
        """Save a machine's present state as a baseline; the machine goes on from it, proved."""
        return self._desk.snapshot(cell, machine, name, kind)

    def reset(self, cell: str, machine: str, baseline: str | None = None) -> ResetView:
        """Put one machine back to the baseline it came from, or to a named one, proved, and plug it in."""
        return self._desk.reset(cell, machine, baseline)

    def reset_cell(self, cell: str) -> list[ResetView]:
        """Put all machines of a cell back as a group."""
        return self._desk.reset_all(cell)

    def exec(self, cell: str, machine: str, argv: list[str], timeout_s: float) -> ExecView:
        """Run a program in a guest, by path or by a name on its PATH, through the qga."""
        return self._desk.exec(cell, machine, argv, timeout_s)

    def probe(self, cell: str, machine: str) -> ProbeView:
        """Ask what answers on a machine."""
        return self._desk.probe(cell, machine)

    # -- trials ---------------------------------------------------------------------------------------

    def create_trial(self, request: TrialRequest) -> TrialView:
        """Queue a trial."""
        return self._view(self._trials.create(request))

    def trials(self, *, state: TrialState | None, subject: str | None, limit: int, offset: int) -> TrialPage:
        """Trials, newest first."""
        page = queries.trials(
            self._bench.store, states=(state,) if state else (), subject=subject, limit=limit, offset=offset
        )
        items = tuple(self._view_of(r) for r in page.rows)
        return TrialPage(items=items, total=page.total, limit=limit, offset=offset)

    def trial(self, trial_id: str) -> TrialView:
        """One trial."""
        return self._view(trial_id)

    def _view(self, trial_id: str) -> TrialView:
        return self._view_of(queries.get(self._bench.store, trial_id))

    def _view_of(self, row: queries.TrialRow) -> TrialView:
        view = views.trial_view(row, self._bench.paths)
        position, why = self._trials.place(row.id)
        return view.model_copy(update={"position": position, "waiting": why})

    def follow(self, trial_id: str, from_seq: int) -> Iterator[JournalEntry | None]:
        """Journal entries as they come; None each second; ends with the trial."""
        store = self._bench.store
        queries.get(store, trial_id)
        return follow(
            lambda: self._archive.place(trial_id) / records.JOURNAL,
            seldom(
                self._bench.paths.open_trials / trial_id, lambda: queries.get(store, trial_id).state.ended
            ),
            from_seq,
        )

    def abort(self, trial_id: str) -> TrialView:
        """Stop a trial; safe at any moment."""
        row = queries.get(self._bench.store, trial_id)
        if row.state.ended:
            raise ConflictError(f"trial {trial_id} has ended: {row.state}", hint="there is nothing to abort")
        self._trials.abort(trial_id, "aborted on request")
        return self._view(trial_id)

    def score(self, trial_id: str) -> dict[str, object]:
        """The scorecard as JSON."""
        return self._archive.score(trial_id)

    def bundle(self, trial_id: str) -> Path:
        """Directory of the sealed evidence."""
        return self._archive.bundle(trial_id)

    # -- safety ---------------------------------------------------------------------------------------

    def kill(self, reason: str) -> KillView:
        """Cut all links first, then end all trials and machines; nothing is accepted until ``rearm``."""
        return self._switches.kill(reason)

    def rearm(self) -> HealthView:
        """Accept trials again. Raises ``ConflictError`` if there is no warden any more."""
        self._switches.rearm()
        return self.health()

    def sweep(self, dry_run: bool) -> SweepView:
        """Strays of this home."""
        return self._switches.sweep(dry_run)

    def close(self) -> None:
        """Abort what runs, stop all machines, remove all that is ours. Safe when repeated."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            try:
                self._switches.end()
            finally:
                self._bench.store.close()
