"""The trials' desk: a queue, one worker, and a stop flag for each trial."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from appliance.cell.cell import Cell
from appliance.config import HostSettings, Library
from appliance.errors import Blame, ConflictError, HotcellError
from appliance.evidence.folder import TrialFolder
from appliance.model import TrialState
from appliance.pipeline.conduct import Bench, Outcome, conduct, open_folder
from appliance.pipeline.fleet import machines_for, require_capacity
from appliance.pipeline.views import LiveTrial
from appliance.service import TrialRequest
from appliance.store import queries
from appliance.trial.plan import Plan, make_plan, new_trial_id
from appliance.trial.records import Limits
from appliance.trial.stop import StopFlag

_CLOSE_S = 60.0


@dataclass
class _Job:
    plan: Plan
    folder: TrialFolder
    live: LiveTrial
    stop: StopFlag = field(default_factory=StopFlag)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def cell(self) -> str:
        """The cell's id is the trial's own, so that its machines tell whose they are."""
        return self.plan.id


class TrialDesk:
    """Takes requests, runs one trial after another."""

    def __init__(
        self, bench: Bench, settings: HostSettings, library: Library, cells: dict[str, Cell]
    ) -> None:
        self.accepting = True
        self._bench = bench
        self._settings = settings
        self._library = library
        self._cells = cells
        self._jobs: dict[str, _Job] = {}
        self._queue: queue.Queue[_Job | None] = queue.Queue()
        self._lock = threading.Lock()
        self._running: str | None = None
        self._worker = threading.Thread(target=self._work, name="trials", daemon=True)
        self._worker.start()

    def require_accepting(self) -> None:
        """Raise if the kill switch was thrown.

        Raises:
            ConflictError: nothing is accepted until ``rearm``.
        """
        if not self.accepting:
            raise ConflictError(
                "the kill switch was thrown; nothing is accepted", hint="`hotcell rearm` when it is safe"
            )

    def create(self, request: TrialRequest) -> str:
        """Plan and queue a trial; returns its id.

        Raises:
            NotFoundError: a subject, scenario, policy or image does not exist.
            ConflictError: the key is known with another body, or the kill switch was thrown.
        """
        with self._lock:
            plan = self._plan(request)
            known = queries.by_key(self._bench.store, request.key) if request.key is not None else None
            if known is not None:
                # The digest covers subject, scenario, policy, limits and seed: the whole of a request.
                if known.config_sha256 != plan.header.config_sha256:
                    raise ConflictError(
                        f"key {request.key!r} was used for another request (trial {known.id})",
                        hint="use a new key for a new trial",
                    )
                return known.id
            self.require_accepting()
            folder = open_folder(self._bench, plan)
            job = _Job(plan, folder, LiveTrial(request))
            self._jobs[plan.id] = job
            self._queue.put(job)
            return plan.id

    def _plan(self, request: TrialRequest) -> Plan:
        subject = self._library.subject(request.subject)
        scenario = self._library.scenario(request.scenario)
        policy = self._library.policy(request.policy)
        machines, weights = machines_for(subject, scenario, self._settings, self._bench.paths)
        require_capacity(machines, self._settings, self._bench.paths.home)
        chosen = {k: v for k, v in request.limits.model_dump().items() if v is not None}
        own = scenario.limits.model_dump(exclude={"format_retries"})
        shop = self._bench.shop
        return make_plan(
            new_trial_id(), subject, scenario, policy, Limits.model_validate(own | chosen), request.seed,
            machines, weights, shop.accelerator, shop.libvirt.versions(), time.time(), request.key,
        )  # fmt: skip

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            with self._lock:
                self._running = job.plan.id
            try:
                self._conduct(job)
            except Exception as e:  # noqa: BLE001 - one broken trial must not take the worker from all others
                self._note_defect(job, f"{type(e).__name__}: {e}")
            finally:
                with self._lock:
                    self._running = None
                job.done.set()

    def _note_defect(self, job: _Job, reason: str) -> None:
        hint = "a defect of Hotcell; the next start seals what there is"
        job.live.outcome = Outcome(TrialState.VOID, blame=Blame.LAB, reason=reason, hint=hint)
        with suppress(HotcellError):
            queries.upsert_state(
                self._bench.store, job.plan.id, TrialState.VOID, ended=time.time(), void_reason=reason
            )

    def _conduct(self, job: _Job) -> None:
        cell = Cell(job.cell, self._bench.shop)
        self._cells[cell.id] = cell
        try:
            job.live.outcome = conduct(
                self._bench, job.plan, job.folder, cell, job.stop, lambda s: self._on_state(job, s)
            )
        finally:
            self._cells.pop(cell.id, None)

    def _on_state(self, job: _Job, state: TrialState) -> None:
        if state is TrialState.RUNNING:
            job.live.started = time.time()

    def live(self, trial_id: str) -> LiveTrial | None:
        """What this process knows of a trial, if it ran here."""
        job = self._jobs.get(trial_id)
        return job.live if job else None

    def trial_of(self, cell: str) -> str | None:
        """The trial that a cell belongs to, while it runs."""
        with self._lock:
            return cell if self._running == cell else None

    def load(self) -> tuple[int, int]:
        """Trials running and trials waiting."""
        with self._lock:
            return int(self._running is not None), self._queue.qsize()

    def abort(self, trial_id: str, reason: str, *, failure: bool = False) -> None:
        """Ask a trial to stop; its links are cut at once. With ``failure`` it is void: nobody wanted it."""
        job = self._jobs.get(trial_id)
        if job is None:
            return
        job.stop.set(reason, failure=failure)
        cell = self._cells.get(job.cell)
        if cell is not None:
            cell.condemn()
            if not cell.machines:  # it still waits for its baselines
                self._bench.shelf.stop_making()

    def abort_all(self, reason: str, *, failure: bool = False) -> int:
        """Ask every trial that has not ended to stop; returns how many."""
        with self._lock:  # a trial that is just being created is in the list afterwards, or refused
            open_jobs = [j for j in self._jobs.values() if not j.done.is_set()]
        for job in open_jobs:
            with suppress(HotcellError):  # a link that is not cut must not keep the other trials running
                self.abort(job.plan.id, reason, failure=failure)
        return len(open_jobs)

    def close(self) -> None:
        """Abort everything and wait for the worker."""
        self.accepting = False
        self.abort_all("the server stops")
        self._queue.put(None)
        self._worker.join(_CLOSE_S)
