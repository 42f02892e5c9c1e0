"""The laboratory: what clients can ask for, carried out. Implements :class:`appliance.service.LabService`."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from appliance import __version__
from appliance.build import find_image, list_recipes
from appliance.cell.baseline import Baseline
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.proof import Proof
from appliance.cell.snapshot import snapshot
from appliance.cell.warden import Warden
from appliance.config import HostSettings, Library
from appliance.errors import ConflictError, HotcellError, LabError, NotFoundError
from appliance.host.capacity import host_capacity, own_footprint
from appliance.model import TrialState
from appliance.pipeline import views
from appliance.pipeline.conduct import Bench
from appliance.pipeline.fleet import machines_for, require_capacity
from appliance.pipeline.following import follow
from appliance.pipeline.process import seal_facts, sweep_view
from appliance.pipeline.trials import TrialDesk
from appliance.service import (
    BaselineView,
    CellRequest,
    CellView,
    ExecView,
    FootprintView,
    HealthView,
    ImageView,
    KillView,
    MachineView,
    ProbeView,
    ResetView,
    SealView,
    SweepView,
    TrialPage,
    TrialRequest,
    TrialView,
)
from appliance.store import queries
from appliance.trial import records
from appliance.trial.probing import probe
from appliance.trial.records import JournalEntry

_FOLLOW_S = 0.2


class Lab:
    """One laboratory in one sealed process. Every call may come from any thread."""

    def __init__(
        self, bench: Bench, settings: HostSettings, library: Library, warden: Warden, cells: dict[str, Cell]
    ) -> None:
        self._bench = bench
        self._settings = settings
        self._library = library
        self._warden = warden
        self._cells = cells
        self._lock = threading.Lock()
        self._busy: set[tuple[str, str]] = set()
        self._began = time.monotonic()
        self._desk = TrialDesk(bench, settings, library, cells)
        self._closing = threading.Event()
        warden.guard(self._unguarded)

    # -- looking --------------------------------------------------------------------------------------

    def health(self) -> HealthView:
        """State of the whole."""
        try:
            facts = seal_facts(self._bench.known_links)
            broken = "; ".join(f"{f.name}: {f.found}" for f in facts if not f.passed)
        except HotcellError as e:
            broken = e.message
        own = own_footprint()
        running, queue = self._desk.load()
        return HealthView(
            ok=not broken and self._warden.alive and self._desk.accepting, version=__version__,
            uptime_s=time.monotonic() - self._began, accelerator=self._bench.shop.accelerator,
            seal=SealView(sealed=not broken, detail=broken or "own namespace; loopback, bridges, taps"),
            warden=self._warden.alive, accepting=self._desk.accepting, trials_running=running, queue=queue,
            footprint=FootprintView(rss=own.rss, cpu_s=own.cpu_s),
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
        with self._lock:
            cells = list(self._cells.values())
        return [self._cell_view(c) for c in cells]

    def _cell_view(self, cell: Cell) -> CellView:
        trial = self._desk.trial_of(cell.id)
        plugged = any(m.plugged for m in cell.machines.values())
        return views.cell_view(cell, trial, "plugged" if plugged else "cut" if cell.machines else "empty")

    def machines(self) -> list[MachineView]:
        """Machines of all open cells."""
        with self._lock:
            machines = [m for c in self._cells.values() for m in list(c.machines.values())]
        return [views.machine_view(m) for m in machines]

    def baselines(self) -> list[BaselineView]:
        """Saved states."""
        return [views.baseline_view(b) for b in self._bench.shelf.all()]

    # -- machines of cells opened by hand ---------------------------------------------------------------

    def open_cell(self, request: CellRequest) -> CellView:
        """A cell with an origin and targets, outside of trials; made of the replicate scenario's machines."""
        self._desk.require_accepting()
        self._library.policy(request.policy)
        scenario = self._library.scenario("replicate").model_copy(update={"targets": request.targets})
        machines, _ = machines_for(self._library.subject("idle"), scenario, self._settings, self._bench.paths)
        require_capacity(machines, self._settings, self._bench.paths.home)
        baselines = self._bench.shelf.ensure(machines, lambda _m, _d, _s: None)
        cell = Cell(f"c{secrets.token_hex(3)}", self._bench.shop)
        with self._lock:
            self._cells[cell.id] = cell
        try:
            # Again: baselines may have taken minutes, and the kill switch condemned the cells it saw.
            self._desk.require_accepting()
            cell.open()
            cell.restore_all([baselines[m.name] for m in machines], lambda _p: None)
            cell.plug_all()
        except BaseException:
            self._remove_cell(cell)
            raise
        return self._cell_view(cell)

    def close_cell(self, cell: str) -> CellView:
        """Stop a cell's machines and remove all that is theirs."""
        found = self._own_cell(cell)
        view = self._cell_view(found)
        self._remove_cell(found)
        return view.model_copy(update={"state": "closed", "machines": ()})

    def _remove_cell(self, cell: Cell) -> None:
        try:
            cell.close()
        finally:
            with self._lock:
                self._cells.pop(cell.id, None)

    def _any_cell(self, cell: str) -> Cell:
        with self._lock:
            found = self._cells.get(cell)
            known = ", ".join(self._cells) or "none"
        if found is None:
            raise NotFoundError(f"there is no open cell {cell!r}", hint=f"open cells: {known}")
        return found

    def _own_cell(self, cell: str) -> Cell:
        found = self._any_cell(cell)
        trial = self._desk.trial_of(cell)
        if trial is not None:
            raise ConflictError(
                f"cell {cell} belongs to the running trial {trial}", hint=f"`hotcell abort {trial}` ends it"
            )
        return found

    def _claim(self, cell: str, machine: str) -> tuple[Cell, Incarnation]:
        found = self._own_cell(cell)
        incarnation = found.machine(machine)
        with self._lock:
            if (cell, machine) in self._busy:
                raise ConflictError(
                    f"{machine} of {cell} is busy with another request", hint="repeat it when that has ended"
                )
            self._busy.add((cell, machine))
        return found, incarnation

    def _release(self, cell: str, machine: str) -> None:
        with self._lock:
            self._busy.discard((cell, machine))

    def snapshot(self, cell: str, machine: str, name: str) -> BaselineView:
        """Save a machine's present state as a baseline; the machine goes on from it, proved."""
        found, incarnation = self._claim(cell, machine)
        try:
            taken = next((b for b in self._bench.shelf.all() if b.id == name), None)
            if taken is not None:
                raise ConflictError(f"there is a baseline {name!r} already", hint="choose another name")
            made = snapshot(self._bench.shop, found, machine, self._baseline_of(incarnation), name)
            found.replace(made, lambda _p: None)
            found.plug_all()
            return views.baseline_view(made)
        finally:
            self._release(cell, machine)

    def reset(self, cell: str, machine: str) -> ResetView:
        """Put one machine back to the baseline it came from, prove it, plug it in again."""
        found, incarnation = self._claim(cell, machine)
        try:
            proof: Proof = found.replace(self._baseline_of(incarnation), lambda _p: None)
            found.plug_all()
            return ResetView(cell=cell, machine=machine, proved=proof.proved, proof=views.proof_record(proof))
        finally:
            self._release(cell, machine)

    def _baseline_of(self, machine: Incarnation) -> Baseline:
        ram = machine.spec.ram_file
        found = next((b for b in self._bench.shelf.all() if b.expected.ram_file == ram), None)
        if found is None:
            raise LabError(
                f"the baseline of {machine.name} is gone", hint="close the cell and open a new one"
            )
        return found

    def exec(self, cell: str, machine: str, argv: list[str], timeout_s: float) -> ExecView:
        """Run a command in a guest, by absolute path, through the qga."""
        _, incarnation = self._claim(cell, machine)
        began = time.monotonic()
        try:
            result = incarnation.qga.exec(argv, timeout_s=timeout_s)
        finally:
            self._release(cell, machine)
        return views.exec_view(result, time.monotonic() - began)

    def probe(self, cell: str, machine: str) -> ProbeView:
        """Ask what answers on a machine."""
        _, incarnation = self._claim(cell, machine)
        try:
            result = probe(incarnation, "before")
        finally:
            self._release(cell, machine)
        return ProbeView(
            machine=machine, model=result.model is not None, agent=result.agent is not None,
            listeners=result.listeners, seconds=result.ended - result.started, problem=result.problem,
        )  # fmt: skip

    # -- trials ---------------------------------------------------------------------------------------

    def create_trial(self, request: TrialRequest) -> TrialView:
        """Queue a trial."""
        return self._view(self._desk.create(request))

    def trials(self, *, state: TrialState | None, subject: str | None, limit: int, offset: int) -> TrialPage:
        """Trials, newest first."""
        page = queries.trials(
            self._bench.store, states=(state,) if state else (), subject=subject, limit=limit, offset=offset
        )
        items = tuple(views.trial_view(r, self._bench.paths, self._desk.live(r.id)) for r in page.rows)
        return TrialPage(items=items, total=page.total, limit=limit, offset=offset)

    def trial(self, trial_id: str) -> TrialView:
        """One trial."""
        return self._view(trial_id)

    def _view(self, trial_id: str) -> TrialView:
        row = queries.get(self._bench.store, trial_id)
        return views.trial_view(row, self._bench.paths, self._desk.live(trial_id))

    def _folder(self, trial_id: str) -> Path:
        queries.get(self._bench.store, trial_id)
        sealed = self._bench.paths.bundles / trial_id
        return sealed if sealed.exists() else self._bench.paths.open_trials / trial_id

    def follow(self, trial_id: str, from_seq: int) -> Iterator[JournalEntry | None]:
        """Journal entries as they come; None each second; ends with the trial."""
        store = self._bench.store
        queries.get(store, trial_id)
        return follow(
            lambda: self._folder(trial_id) / records.JOURNAL,
            lambda: queries.get(store, trial_id).state.ended,
            from_seq,
        )

    def abort(self, trial_id: str) -> TrialView:
        """Stop a trial; safe at any moment."""
        row = queries.get(self._bench.store, trial_id)
        if row.state.ended:
            raise ConflictError(f"trial {trial_id} has ended: {row.state}", hint="there is nothing to abort")
        self._desk.abort(trial_id, "aborted on request")
        return self._view(trial_id)

    def score(self, trial_id: str) -> dict[str, object]:
        """The scorecard as JSON."""
        from appliance.score.card import Scorecard
        from appliance.score.load import load_record

        path = self._folder(trial_id) / records.SCORE
        if not path.exists():
            state = self._view(trial_id).state
            raise ConflictError(
                f"trial {trial_id} has no score: it is {state}", hint="only a sealed trial is scored"
            )
        return load_record(path, Scorecard).model_dump(mode="json")

    def bundle(self, trial_id: str) -> Path:
        """Directory of the sealed evidence."""
        queries.get(self._bench.store, trial_id)
        path = self._bench.paths.bundles / trial_id
        if not path.exists():
            raise ConflictError(
                f"trial {trial_id} is not sealed yet", hint=f"`hotcell follow {trial_id}` waits for it"
            )
        return path

    # -- safety ---------------------------------------------------------------------------------------

    def kill(self, reason: str) -> KillView:
        """Cut all links first, then end all trials and machines; nothing is accepted until ``rearm``."""
        began = time.monotonic()
        self._desk.accepting = False
        with self._lock:
            cells = list(self._cells.values())
        problems: list[str] = []
        links = machines = 0
        for cell in cells:
            links += sum(m.plugged for m in cell.machines.values())
            try:
                cell.condemn()
            except HotcellError as e:
                problems.append(e.message)
        ended = self._desk.abort_all(f"kill switch: {reason}")
        self._bench.shelf.stop_making()
        for cell in cells:
            for machine in list(cell.machines.values()):
                machines += machine.kill()
            if self._desk.trial_of(cell.id) is None:
                try:
                    self._remove_cell(cell)
                except HotcellError as e:
                    problems.append(e.message)
        return KillView(
            reason=reason, links_cut=links, machines_stopped=machines, trials_ended=ended,
            seconds=time.monotonic() - began, problems=tuple(problems),
        )  # fmt: skip

    def _unguarded(self) -> None:
        """The warden is gone: it cut the cells since we were silent, or was killed. Nothing goes on unwatched."""
        self._desk.accepting = False
        self._desk.abort_all("the warden has ended: the cells were cut, or nobody watches", failure=True)
        self.kill("the warden has ended")

    def rearm(self) -> HealthView:
        """Accept trials again.

        Raises:
            ConflictError: there is no warden any more.
        """
        if not self._warden.alive:
            raise ConflictError("the warden has ended", hint="stop the server and start it again")
        self._desk.accepting = True
        return self.health()

    def sweep(self, dry_run: bool) -> SweepView:
        """Strays of this home."""
        with self._lock:
            in_use = set(self._cells)
        in_use |= self._bench.shelf.cells_in_use()
        shop = self._bench.shop
        return sweep_view(self._bench.paths, shop.libvirt, shop.ledger, in_use, dry_run=dry_run)

    def close(self) -> None:
        """Abort what runs, stop all machines, remove all that is ours."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
        self._desk.close()
        for cell in list(self._cells.values()):
            try:
                self._remove_cell(cell)
            except HotcellError:
                continue  # the warden and the next start's sweep take what is left
        shop = self._bench.shop
        sweep_view(self._bench.paths, shop.libvirt, shop.ledger, set(), dry_run=False)
        self._warden.dismiss()
        shop.libvirt.close()
        shop.ledger.close()
