"""The cells' desk: cells opened by hand, and the verbs on single machines of them.

A machine is claimed for the length of one request; a second request for it is refused at once, never queued.
A cell of a running trial is the trial's alone. Room for a cell is taken before anything of it is made.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from appliance.cell.baseline import Baseline
from appliance.cell.baseline.importing import require_free_name
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.snapshot import snapshot
from appliance.cell.spec import MachineSpec
from appliance.config import HostSettings, Library
from appliance.errors import ConflictError, GuestTimeoutError, LabError, NotFoundError
from appliance.pipeline import views
from appliance.pipeline.admission import need_of
from appliance.pipeline.claims import Claims
from appliance.pipeline.conduct import Bench
from appliance.pipeline.fleet import machines_for
from appliance.pipeline.grants import Grants
from appliance.pipeline.trials import TrialDesk
from appliance.service import (
    BaselineKind,
    BaselineView,
    CellRequest,
    CellView,
    ExecView,
    MachineView,
    ProbeView,
    ResetView,
)
from appliance.trial.guard import CellGuard
from appliance.trial.probing import probe

_CLAIMS_S = 30.0


class CellDesk:
    """Every call may come from any thread. ``cells`` holds all open cells, also those of trials."""

    def __init__(
        self,
        bench: Bench,
        settings: HostSettings,
        library: Library,
        cells: dict[str, Cell],
        trials: TrialDesk,
        grants: Grants,
    ) -> None:
        self._bench = bench
        self._settings = settings
        self._library = library
        self._cells = cells
        self._trials = trials
        self._grants = grants
        self._lock = threading.Lock()
        self._claims = Claims()
        self._guards: dict[str, CellGuard] = {}
        self._resizing: dict[tuple[str, str], Baseline] = {}  # what is being reset to, by cell and machine

    # -- looking --------------------------------------------------------------------------------------

    def all(self) -> list[Cell]:
        """Open cells, the trials' too."""
        with self._lock:
            return list(self._cells.values())

    def views(self) -> list[CellView]:
        """Open cells, for clients."""
        return [self._view(c) for c in self.all()]

    def _view(self, cell: Cell) -> CellView:
        trial = self._trials.trial_of(cell.id)
        plugged = any(m.plugged for m in cell.machines.values())
        return views.cell_view(cell, trial, "plugged" if plugged else "cut" if cell.machines else "empty")

    def machines(self) -> list[MachineView]:
        """Machines of all open cells."""
        return [views.machine_view(m) for c in self.all() for m in c.machines.values()]

    def busy(self) -> bool:
        """Whether a machine is claimed by a request now."""
        return self._claims.any()

    # -- cells ----------------------------------------------------------------------------------------

    def open(self, request: CellRequest) -> CellView:
        """A cell with an origin and targets, outside of trials; made of the replicate scenario's machines.

        Raises:
            ConflictError: the kill switch was thrown, or trials wait for room, which it would take from them.
            CapacityError: there is no room for it now.
        """
        self._trials.require_accepting()
        self._trials.require_none_waits()
        self._library.policy(request.policy)
        scenario = self._library.scenario("replicate").model_copy(update={"targets": request.targets})
        machines, _ = machines_for(self._library.subject("idle"), scenario, self._settings, self._bench.paths)
        cell = Cell(f"c{secrets.token_hex(3)}", self._bench.shop, self._bench.standbys)
        self._grants.require(cell.id, need_of(machines, self._settings.limits.disk_mb))
        with self._claims.hold(cell.id):
            return self._fill(cell, machines)

    def _fill(self, cell: Cell, machines: Sequence[MachineSpec]) -> CellView:
        try:
            baselines = self._bench.shelf.ensure(
                machines, lambda _m, _d, _s: None, self._trials.require_accepting, "cell"
            )
            with self._lock:
                self._cells[cell.id] = cell
            # Again: baselines may have taken minutes, and the kill switch condemned the cells it saw.
            self._trials.require_accepting()
            self._bench.shelf.store.hold(baselines.values(), cell.id)
            cell.open()
            self._guards[cell.id] = CellGuard(cell, self._settings.limits.disk_mb)
            self._guards[cell.id].start()
            cell.restore_all([baselines[m.name] for m in machines], lambda _p: None)
            cell.plug_all()
        except BaseException:
            with suppress(
                Exception
            ):  # the first error is the one to tell; what withstands stays an open cell
                self._end(cell)
            raise
        self._keep_standbys(cell)
        return self._view(cell)

    def _keep_standbys(self, cell: Cell) -> None:
        # What was asked for is done; without standbys the next reset is slower, and says why.
        with suppress(Exception):
            self._bench.standbys.keep(cell.id, cell.baselines.values())

    def close(self, cell: str) -> CellView:
        """Stop a cell's machines and remove all that is theirs."""
        self._own(cell)
        with self._claims.hold(cell):
            found = self._own(cell)
            view = self._view(found)
            self._end(found)
        return view.model_copy(update={"state": "closed", "machines": ()})

    def remove(self, cell: Cell) -> None:
        """Cut a cell for good, close it and forget it. Kill its machines before.

        A request that restores a machine is waited for, since the machine would be added to a cell that is gone.

        Raises:
            LabError: a request still works on it, or something of it is left; it stays an open cell, cut.
        """
        cell.condemn()
        if not self._claims.wait_free(cell.id, _CLAIMS_S):
            raise LabError(
                f"a request has worked on cell {cell.id} for {_CLAIMS_S:.0f} s more; it is cut, but still open",
                hint=f"`hotcell close {cell.id}` when that has ended",
            )
        self._end(cell)

    def _end(self, cell: Cell) -> None:
        """Close and forget a cell. One that withstands stays open with its room, cut for good, to be tried again."""
        try:
            cell.close()
        except BaseException:
            cell.condemn()
            with self._lock:
                self._cells[cell.id] = cell
            raise
        self._bench.standbys.forget(cell.id)
        self._bench.shelf.store.release(cell.id)
        with self._lock:
            self._cells.pop(cell.id, None)
        self._grants.release(cell.id)
        guard = self._guards.pop(cell.id, None)
        if guard is not None:
            guard.dismiss()

    def _own(self, cell: str) -> Cell:
        with self._lock:
            found = self._cells.get(cell)
            known = ", ".join(self._cells) or "none"
        if found is None:
            raise NotFoundError(f"there is no open cell {cell!r}", hint=f"open cells: {known}")
        trial = self._trials.trial_of(cell)
        if trial is not None:
            raise ConflictError(
                f"cell {cell} belongs to the running trial {trial}", hint=f"`hotcell abort {trial}` ends it"
            )
        return found

    # -- machines -------------------------------------------------------------------------------------

    @contextmanager
    def _claim(self, cell: str, machine: str) -> Iterator[tuple[Cell, Incarnation]]:
        """One machine, for one request.

        Raises:
            NotFoundError: there is no such cell or machine.
            ConflictError: the cell is a trial's, or another request has the machine.
        """
        self._own(cell)
        with self._claims.hold(cell, machine):
            found = self._own(cell)  # again: it may have been closed or reset until we had it
            yield found, found.machine(machine)

    def snapshot(self, cell: str, machine: str, name: str, kind: BaselineKind | None = None) -> BaselineView:
        """Save a machine's present state as a baseline; the machine goes on from it, proved."""
        require_free_name(name)
        with self._claim(cell, machine) as (found, _):
            taken = next((b for b in self._bench.shelf.all() if b.id == name), None)
            if taken is not None:
                raise ConflictError(f"there is a baseline {name!r} already", hint="choose another name")
            made = snapshot(self._bench.shop, found, machine, found.baseline(machine), name, kind)
            self._bench.shelf.store.hold([made], cell)
            found.reset([made], lambda _p: None)
            self._keep_standbys(found)
            return views.baseline_view(made)

    def reset(self, cell: str, machine: str, baseline: str | None = None) -> ResetView:
        """Put one machine back to the baseline it came from, or to a named one of its own, and plug it in.

        Raises:
            NotFoundError: there is no baseline of that name.
            ConflictError: it is another machine's, or one of a machine that is larger or has other devices.
        """
        self._own(cell)
        with self._claims.hold(cell, machine):
            found = self._own(cell)  # again: it may have been closed until we had it
            chosen = found.baseline(machine)  # also of a machine that an earlier reset lost
            if not baseline:
                return self._reset(found, [chosen])[0]
            with self._sizes_of(found, self._named(baseline, chosen)) as chosen:
                self._bench.shelf.store.hold([chosen], cell)
                return self._reset(found, [chosen])[0]

    @contextmanager
    def _sizes_of(self, cell: Cell, chosen: Baseline) -> Iterator[Baseline]:
        """Have a cell's machine become what ``chosen`` is, if there is room; others may do so at the same time."""
        own = (cell.id, chosen.machine.name)
        with self._lock:
            meanwhile = {name: b for (of, name), b in self._resizing.items() if of == cell.id}
            after = cell.baselines | meanwhile | {chosen.machine.name: chosen}
            need = need_of([b.machine for b in after.values()], self._settings.limits.disk_mb)
            self._grants.require_within(cell.id, need)
            self._resizing[own] = chosen
        try:
            yield chosen
        finally:
            with self._lock:
                del self._resizing[own]

    def _named(self, name: str, present: Baseline) -> Baseline:
        """The baseline of that name, whole, if it is one for the machine of ``present``."""
        store, machine = self._bench.shelf.store, present.machine
        found = store.get(name)
        if found.machine.name != machine.name:
            own = ", ".join(b.id for b in store.all() if b.machine.name == machine.name) or "none"
            raise ConflictError(
                f"{name} is a baseline of {found.machine.name}, not of {machine.name}",
                hint=f"baselines of {machine.name}: {own}",
            )
        if found.machine.devices != machine.devices:
            have, wants = (" ".join(m.devices) or "none" for m in (machine, found.machine))
            raise ConflictError(
                f"{name} is of a machine with other passed-through devices: {wants}; {machine.name} has {have}",
                hint="choose a baseline that was saved with the same devices",
            )
        store.verify(found)
        return found

    def reset_all(self, cell: str) -> list[ResetView]:
        """Put all machines of a cell back as a group: none is plugged in before every proof holds.

        Machines that an earlier reset or snapshot lost come back with the others.

        Raises:
            ConflictError: the cell never had a machine.
        """
        self._own(cell)
        with self._claims.hold(cell):
            found = self._own(cell)
            baselines = list(found.baselines.values())
            if not baselines:
                raise ConflictError(f"cell {cell} has no machine to reset", hint=f"`hotcell close {cell}`")
            return self._reset(found, baselines)

    def _reset(self, cell: Cell, baselines: Sequence[Baseline]) -> list[ResetView]:
        renewals = cell.reset(baselines, lambda _p: None)
        self._keep_standbys(cell)
        return [views.reset_view(cell.id, r) for r in renewals]

    def exec(self, cell: str, machine: str, argv: list[str], timeout_s: float) -> ExecView:
        """Run a program in a guest, by path or by a name on its PATH, through the qga."""
        with self._claim(cell, machine) as (_, incarnation):
            began = time.monotonic()
            try:
                result = incarnation.qga.exec(argv, timeout_s=timeout_s)
            except GuestTimeoutError as e:  # as asked for: the guest is well, and who asked knows the limit
                return views.still_running_view(e.pid, time.monotonic() - began)
            return views.exec_view(result, time.monotonic() - began)

    def probe(self, cell: str, machine: str) -> ProbeView:
        """Ask what answers on a machine."""
        with self._claim(cell, machine) as (_, incarnation):
            result = probe(incarnation, "before")
        return ProbeView(
            machine=machine, model=result.model is not None, agent=result.agent is not None,
            listeners=result.listeners, seconds=result.ended - result.started, problem=result.problem,
        )  # fmt: skip
