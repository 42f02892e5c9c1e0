"""The trials' desk: takes requests, plans them, queues them, runs them, stops them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from appliance.cell.cell import Cell
from appliance.config import HostSettings, Library
from appliance.errors import ConflictError, HotcellError, LabError
from appliance.evidence.folder import TrialFolder
from appliance.pipeline.admission import Need, evidence_of, need_of
from appliance.pipeline.conduct import Bench, Outcome, conduct, never_started, open_folder, put_void
from appliance.pipeline.dispatch import Dispatcher, Job, Load
from appliance.pipeline.fleet import machines_for
from appliance.pipeline.grants import Grants
from appliance.service import TrialRequest
from appliance.store import queries
from appliance.trial.plan import Plan, make_plan, new_trial_id
from appliance.trial.records import Limits
from appliance.trial.stop import StopFlag

_CLOSE_S = 60.0
_ABORT_S = 10.0


class TrialDesk:
    """Every call may come from any thread. A trial's cell has the trial's id, so its machines tell whose they are."""

    def __init__(
        self, bench: Bench, settings: HostSettings, library: Library, cells: dict[str, Cell], grants: Grants
    ) -> None:
        self.accepting = True
        self._bench = bench
        self._settings = settings
        self._library = library
        self._cells = cells
        self._grants = grants
        self._creating = threading.Lock()
        self._dispatcher = Dispatcher(grants, settings.guests.max_trials)

    # -- asking ---------------------------------------------------------------------------------------

    def require_accepting(self) -> None:
        """Raise if the kill switch was thrown.

        Raises:
            ConflictError: nothing is accepted until ``rearm``.
        """
        if not self.accepting:
            raise ConflictError(
                "the kill switch was thrown; nothing is accepted", hint="`hotcell rearm` when it is safe"
            )

    def require_none_waits(self) -> None:
        """Raise if a trial waits for room: who asks now must not take it.

        Raises:
            ConflictError: trials wait.
        """
        waiting = self.load().waiting
        if waiting:
            raise ConflictError(
                f"{waiting} trials wait for room, and it is theirs first", hint="wait for them, or abort them"
            )

    def create(self, request: TrialRequest) -> str:
        """Plan and queue a trial; returns its id.

        Raises:
            NotFoundError: a subject, scenario, policy or image does not exist.
            ConflictError: the key is known with another request, or the kill switch was thrown.
            CapacityError: its machines would not fit if nothing else of ours ran.
        """
        with self._creating:  # two requests with one key are one trial
            plan = self._plan(request)
            known = queries.by_key(self._bench.store, request.key) if request.key is not None else None
            if known is not None:
                # The digest covers subject, scenario, policy, limits and seed: all that a trial does. A batch
                # orders the queue only, and this one has its place.
                if known.config_sha256 != plan.header.config_sha256:
                    raise ConflictError(
                        f"key {request.key!r} was used for another request (trial {known.id})",
                        hint="use a new key for a new trial",
                    )
                return known.id
            limits = plan.header.limits
            need = need_of(plan.machines, limits.disk_mb, evidence_of(limits.steps))
            self._grants.require_possible(need)
            return self._dispatcher.put(lambda: self._job(request, plan, need)).id

    def _job(self, request: TrialRequest, plan: Plan, need: Need) -> Job:
        self.require_accepting()
        folder, stop = open_folder(self._bench, plan), StopFlag()

        def tell(why: str) -> None:
            with suppress(HotcellError):  # a journal that cannot be written voids the trial when it runs
                folder.journal.write("waiting", reason=why)

        return Job(
            id=plan.id, need=need, batch=request.batch or "", stop=stop, tell=tell,
            run=lambda: self._end(plan, lambda: self._conduct(plan, folder, stop)),
            never=lambda: self._end(plan, lambda: never_started(self._bench, plan, folder, stop)),
            left=lambda: plan.id in self._cells,
        )  # fmt: skip

    def _plan(self, request: TrialRequest) -> Plan:
        subject = self._library.subject(request.subject)
        scenario = self._library.scenario(request.scenario)
        policy = self._library.policy(request.policy)
        machines, weights = machines_for(subject, scenario, self._settings, self._bench.paths)
        chosen = {k: v for k, v in request.limits.model_dump().items() if v is not None}
        own = scenario.limits.model_dump(exclude={"format_retries"})
        shop = self._bench.shop
        return make_plan(
            new_trial_id(), subject, scenario, policy, Limits.model_validate(own | chosen), request.seed,
            machines, weights, shop.accelerator, shop.libvirt.versions(), time.time(), request.key,
        )  # fmt: skip

    # -- running --------------------------------------------------------------------------------------

    def _end(self, plan: Plan, how: Callable[[], Outcome]) -> None:
        # What comes of it is in the index, and nowhere else: it would be held for each trial that ever ran.
        try:
            how()
        except Exception as e:  # noqa: BLE001 - one broken trial must not take the desk from all others
            hint = "a defect of Hotcell; the next start seals and indexes what there is"
            with suppress(HotcellError):
                put_void(self._bench, plan.id, f"{type(e).__name__}: {e}", hint)

    def _conduct(self, plan: Plan, folder: TrialFolder, stop: StopFlag) -> Outcome:
        cell = Cell(plan.id, self._bench.shop, self._bench.standbys)

        def on_gone() -> None:
            # Now, not at the end: who sees that the trial has ended may ask for its room at once. A cell whose
            # machines withstand stays open, with its room: it can be closed by hand, and the kill switch sees it.
            if cell.empty:
                self._cells.pop(plan.id, None)
                self._grants.release(plan.id)

        self._cells[cell.id] = cell
        return conduct(self._bench, plan, folder, cell, stop, on_gone)

    # -- looking --------------------------------------------------------------------------------------

    def trial_of(self, cell: str) -> str | None:
        """The trial that a cell belongs to, while it runs."""
        return cell if self._dispatcher.runs(cell) else None

    def load(self) -> Load:
        """Trials running and waiting, and why the first of the latter waits."""
        return self._dispatcher.load()

    def place(self, trial_id: str) -> tuple[int | None, str]:
        """A trial's place in the queue, from 1, and why it waits; None and "" if it does not wait."""
        return self._dispatcher.place(trial_id)

    # -- stopping -------------------------------------------------------------------------------------

    def abort(self, trial_id: str, reason: str, *, failure: bool = False) -> None:
        """Ask a trial to stop; its links are cut at once. With ``failure`` it is void: nobody wanted it.

        One that waits for its turn has ended when this returns, unless its evidence takes long to seal.
        """
        job, waits = self._dispatcher.find(trial_id)
        if job is None:
            return
        self._stop(job, reason, failure=failure)
        if waits:
            job.done.wait(_ABORT_S)

    def _stop(self, job: Job, reason: str, *, failure: bool) -> None:
        self._dispatcher.stop(job, reason, failure=failure)
        cell = self._cells.get(job.id)
        problem = cell.condemn().problem(cell.id) if cell is not None else ""
        if problem:
            raise LabError(problem)

    def abort_all(self, reason: str, *, failure: bool = False) -> int:
        """Ask every trial that has not ended to stop; returns how many."""
        open_jobs = self._dispatcher.open_jobs()
        for job in open_jobs:
            with suppress(Exception):  # whatever it is, it must not keep the other trials running
                self._stop(job, reason, failure=failure)
        return len(open_jobs)

    def close(self) -> None:
        """Abort everything and wait for it to end."""
        self.accepting = False
        self.abort_all("the server stops")
        self._dispatcher.close(_CLOSE_S)
