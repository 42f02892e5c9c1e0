"""Who waits and who runs: one dispatcher gives turns, each job runs in a thread of its own.

A job starts once it is its turn and there is room for all its machines; the room is taken before it begins
and given back when it has ended and nothing of it is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from appliance.pipeline.admission import Decision, Need, Verdict
from appliance.pipeline.grants import Grants
from appliance.pipeline.turns import Turns
from appliance.trial.stop import StopFlag

_LOOK_S = 1.0  # what is free changes without telling us


@dataclass
class Job:
    """One trial to run. None of the callables may raise.

    ``run`` runs it, ``never`` ends it if it was stopped before its turn came, ``tell`` is told once that it has
    to wait, and why. ``left`` says whether something of it outlived it and keeps its room.
    """

    id: str
    need: Need
    batch: str
    run: Callable[[], None]
    never: Callable[[], None]
    tell: Callable[[str], None]
    left: Callable[[], bool] = lambda: False
    waiting: str = ""
    told: bool = False
    stop: StopFlag = field(default_factory=StopFlag)
    done: threading.Event = field(default_factory=threading.Event)


class Load(NamedTuple):
    """Jobs running and waiting, and why the first of the latter waits."""

    running: int
    waiting: int
    why: str


class _Step(NamedTuple):
    """What is done next: jobs that were stopped while they waited, one to start, what to tell whom."""

    stopped: list[Job]
    started: Job | None
    pressed: bool
    news: list[Job]


class Dispatcher:
    """Runs at most ``most`` jobs at once. Every call may come from any thread."""

    def __init__(self, grants: Grants, most: int) -> None:
        self._grants = grants
        self._most = most
        self._jobs: dict[str, Job] = {}
        self._running: dict[str, Job] = {}
        self._turns = Turns()
        self._closing = False
        self._changed = threading.Condition()
        grants.on_release = self._wake
        self._thread = threading.Thread(target=self._dispatch, name="trials", daemon=True)
        self._thread.start()

    # -- jobs -----------------------------------------------------------------------------------------

    def put(self, make: Callable[[], Job]) -> Job:
        """Queue the job that ``make`` makes. What it raises passes through, and nothing is queued.

        It is made under the lock: who stops all jobs either finds this one, or did so before it was made.
        """
        with self._changed:
            job = make()
            self._jobs[job.id] = job
            self._turns.put(job.id, job.batch)
            self._changed.notify_all()
        return job

    def open_jobs(self) -> list[Job]:
        """Jobs that have not ended."""
        with self._changed:
            return list(self._jobs.values())

    def find(self, key: str) -> tuple[Job | None, bool]:
        """A job that has not ended, and whether it still waits for its turn."""
        with self._changed:
            return self._jobs.get(key), key in self._turns.order()

    def runs(self, key: str) -> bool:
        """Whether this job runs now."""
        with self._changed:
            return key in self._running

    def stop(self, job: Job, reason: str, *, failure: bool) -> None:
        """Ask a job to stop; one that waits is ended by the dispatcher at once."""
        job.stop.set(reason, failure=failure)
        self._wake()

    def load(self) -> Load:
        """How much runs and waits."""
        with self._changed:
            order = self._turns.order()
            why = self._jobs[order[0]].waiting if order else ""
            return Load(len(self._running), len(order), why)

    def place(self, key: str) -> tuple[int | None, str]:
        """A job's place in the queue, from 1, and why it waits; None and "" if it does not wait."""
        with self._changed:
            order = self._turns.order()
            if key not in order:
                return None, ""
            position = order.index(key) + 1
            behind = f"{position - 1} before it" if position > 1 else ""
            return position, self._jobs[key].waiting or behind

    def close(self, limit_s: float) -> None:
        """Wait until every job has ended, and take no more turns. Stopping them is the caller's."""
        deadline = time.monotonic() + limit_s
        with self._changed:
            self._closing = True
            open_jobs = list(self._jobs.values())
            self._changed.notify_all()
        for job in open_jobs:
            job.done.wait(max(0.0, deadline - time.monotonic()))
        self._thread.join(max(0.0, deadline - time.monotonic()))

    # -- dispatching ----------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _dispatch(self) -> None:
        while (step := self._next_step()) is not None:
            for job in step.stopped:
                self._end(job, job.never)
            if step.started is not None:
                job = step.started
                threading.Thread(
                    target=self._end, args=(job, job.run), name=f"trial-{job.id}", daemon=True
                ).start()
            if step.pressed:
                self._grants.give_up_standbys()
            for job in step.news:
                job.told = True
                job.tell(job.waiting)

    def _end(self, job: Job, how: Callable[[], None]) -> None:
        try:
            how()
        finally:
            with self._changed:
                self._running.pop(job.id, None)
                del self._jobs[job.id]
                self._changed.notify_all()
            if not job.left():
                self._grants.release(job.id)
            job.done.set()

    def _next_step(self) -> _Step | None:
        """Wait for something to do; None when the desk is closed and nothing waits."""
        with self._changed:
            while True:
                waiting = [self._jobs[k] for k in self._turns.order()]
                stopped = [j for j in waiting if j.stop.requested]
                for job in stopped:
                    self._turns.remove(job.id)
                started, pressed = (None, False) if stopped else self._take_next()
                news = [j for j in waiting if j.waiting and not (j.told or j is started or j in stopped)]
                if stopped or started or pressed or news:
                    return _Step(stopped, started, pressed, news)
                if self._closing and not waiting:
                    return None
                self._changed.wait(_LOOK_S if waiting else None)

    def _take_next(self) -> tuple[Job | None, bool]:
        """The trial whose turn has come, its room taken, or None; and whether standbys are in the way."""
        asked: dict[Need, Decision] = {}

        def ask(trial: str) -> Verdict:
            job = self._jobs[trial]
            if job.need not in asked:
                asked[job.need] = self._grants.request(trial, job.need)
            job.waiting = asked[job.need].reason
            return asked[job.need].verdict

        if len(self._running) >= self._most:
            self._grants.somebody_waits("")
            for trial in self._turns.order()[:1]:
                self._jobs[trial].waiting = f"{self._most} trials run, and guests.max_trials allows no more"
            return None, False
        chosen = self._turns.pick(ask)
        reason = next((d.reason for d in asked.values() if d.for_memory), "")
        self._grants.somebody_waits(reason, started=chosen is not None)
        if chosen is not None:
            self._running[chosen] = self._jobs[chosen]
            return self._jobs[chosen], False
        pressed = any(d.pressed for d in asked.values()) and self._grants.standbys_hold()
        return None, pressed
