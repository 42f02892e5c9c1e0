"""One trial as a journalled state machine.

reset -> proof -> capture confirmed -> plug -> preflight -> start -> watch -> stop -> probes -> collect ->
reference. Every transition is in the journal before the next begins. Whatever goes wrong, the cell is cut
and destroyed before :meth:`TrialRun.run` returns; what went wrong decides between ``void`` (the lab or the
host) and a trial that counts (the subject).
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from appliance.cell.baseline import Baseline
from appliance.cell.cell import Cell
from appliance.cell.events import Event, EventStream
from appliance.cell.incarnation import Incarnation
from appliance.cell.isolation import SealFact, paths_from_all, require_sealed
from appliance.cell.proof import Proof
from appliance.cell.renewal import Renewal
from appliance.errors import GuestChannelError, GuestTamperError, HotcellError, LabError, SealError
from appliance.model import Role, Stopped, TrialState, printable
from appliance.trial import records, subject
from appliance.trial.guard import TrialGuard
from appliance.trial.plan import Plan
from appliance.trial.ports import Capture, Evidence
from appliance.trial.questioning import Questioning
from appliance.trial.records import (
    Claim,
    DiskFinding,
    Ending,
    PathCheck,
    ResetProof,
    Sample,
)
from appliance.trial.stop import StopFlag
from appliance.trial.watch import Progress, watch


@dataclass(frozen=True)
class Setting:
    """What a run needs from around it. ``seal_facts`` looks at the whole namespace, not only at this cell."""

    cell: Cell
    baselines: Mapping[str, Baseline]
    evidence: Evidence
    stop: StopFlag
    on_state: Callable[[TrialState], None]
    seal_facts: Callable[[], list[SealFact]]


class TrialRun:
    """Runs one plan once."""

    def __init__(self, plan: Plan, setting: Setting) -> None:
        self._plan = plan
        self._s = setting
        self._journal = setting.evidence.journal
        self._proofs: list[Proof] = []
        self._progress = Progress()
        self._stream: EventStream | None = None
        self._capture: Capture | None = None
        self._questioning = Questioning(plan, setting.cell, setting.evidence, setting.stop)
        self._guard = TrialGuard(
            setting.cell, plan.header.limits.disk_mb, self._journal, setting.stop, self._progress.on_cut_off
        )

    @property
    def _cell(self) -> Cell:
        return self._s.cell

    def run(self) -> None:
        """Run to the end of collecting; the cell is gone afterwards, also when this raises.

        Raises:
            TrialAborted: somebody asked to stop.
            HotcellError: the lab or the host failed; the trial is void.
        """
        try:
            self._reset()
            self._start_capture()
            self._preflight()
            ending = self._run_subject()
            self._enter(TrialState.PROBING)
            self._questioning.replicas()
            self._collect(ending)
            self._make_reference()
        except BaseException:
            # The first error is the one to tell; what could not be removed is in the ledger for the sweep.
            with suppress(Exception):
                self._tear_down()
            raise
        self._tear_down()

    def _enter(self, state: TrialState) -> None:
        self._s.stop.check()
        self._s.on_state(state)

    # -- reset and proof ------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._enter(TrialState.RESETTING)
        self._journal.write("resetting", machines=[m.name for m in self._plan.machines])
        self._cell.open()
        for renewal in self._restore([m.name for m in self._plan.machines]):
            self._journal.write(
                "in-place", machine=renewal.machine.name, standby=not renewal.direct_because,
                direct_because=renewal.direct_because, seconds=round(renewal.seconds, 3),
            )  # fmt: skip

    def _restore(self, names: Sequence[str]) -> list[Renewal]:
        try:
            return self._cell.restore_all([self._s.baselines[n] for n in names], self._on_proof)
        finally:
            self._s.evidence.write(records.PROOFS, [ResetProof.of(p) for p in self._proofs])

    def _on_proof(self, proof: Proof) -> None:
        # A withheld machine was replaced, or the reset failed and the journal says why.
        if proof.proved:
            self._proofs.append(proof)
        self._journal.write(
            "proved" if proof.proved else "machine-withheld",
            machine=proof.machine, incarnation=proof.incarnation, seconds=round(proof.seconds, 3),
            checks=len(proof.checks), failures=proof.failures,
        )  # fmt: skip

    # -- capture and preflight ------------------------------------------------------------------------

    def _start_capture(self) -> None:
        self._enter(TrialState.CAPTURING)
        self._capture = self._s.evidence.start_capture(self._cell.bridge)
        self._guard.begin(self._capture)
        self._journal.write("capture-confirmed", interface=self._cell.bridge)

    def _preflight(self) -> None:
        self._enter(TrialState.PREFLIGHT)
        facts = self._s.seal_facts()
        self._journal.write("seal-examined", facts=[f.model_dump() for f in facts])
        require_sealed(facts)
        self._s.stop.check()
        self._cell.plug_all()
        machines = list(self._cell.machines.values())
        with concurrent.futures.ThreadPoolExecutor(len(machines)) as pool:
            # Side by side with the ways out, most of whose time is waiting for answers that must not come.
            before = [pool.submit(question) for question in self._questioning.before()]
            results = [PathCheck.model_validate(r.model_dump()) for r in paths_from_all(machines)]
            self._questioning.keep(job.result() for job in before)
        self._s.evidence.write(records.PREFLIGHT, results)
        counts = {o: sum(r.outcome == o for r in results) for o in ("held", "leaked", "unverified")}
        self._journal.write("preflight", **counts)
        bad = [
            f"{r.machine}: {r.name} {r.outcome} ({r.negative}; twin {r.positive})"
            for r in results
            if r.outcome != "held"
        ]
        if bad or not results:
            raise SealError(
                "preflight: " + ("; ".join(bad[:5]) or "nothing was tried"),
                hint="only a cell whose every way out is shown to be shut starts a trial",
            )

    # -- the subject's run ----------------------------------------------------------------------------

    def _run_subject(self) -> Ending:
        self._enter(TrialState.RUNNING)
        origin = self._questioning.origin
        steps = self._plan.header.limits.steps
        self._stream = EventStream(origin.spec.events_socket, self._on_event, self._progress.on_tamper, steps)
        began = time.monotonic()
        # Written before the start: no packet of the subject's can be older than this entry.
        self._journal.write(records.STARTED, brain=self._plan.header.brain)
        subject.start_agent(origin, self._plan.task_file)
        self._guard.hold_disks()
        stopped = watch(
            self._cell.machines, origin, self._plan.header.limits, self._progress,
            lambda: subject.agent_alive(origin),
            self._on_sample, self._s.stop,
        )  # fmt: skip
        wall = time.monotonic() - began
        self._guard.hold_disks()
        self._enter(TrialState.STOPPING)
        self._journal.write("stopping", reason=stopped.value, seconds=round(wall, 1))
        notes = [] if stopped is Stopped.MACHINE_DOWN else [subject.stop_agent(origin)]
        self._journal.write(records.STOPPED, note="; ".join(n for n in notes if n))
        with self._progress.lock:
            p = self._progress
            return Ending(
                stopped=stopped, wall_s=wall, steps=p.steps, format_errors=p.format_errors,
                finish_claimed=p.finish_claimed, tampering=tuple(p.tampering), notes=tuple(n for n in notes if n),
            )  # fmt: skip

    def _on_sample(self, sample: Sample) -> None:
        self._s.evidence.append(records.SAMPLES, sample)
        self._questioning.sampled(sample)

    def _on_event(self, event: Event) -> None:
        """Called by the stream's reader. An evidence failure here stops the trial, which is then void."""
        self._progress.on_event(event)
        claim = Claim(
            received=time.time(), machine=self._plan.of_role(Role.ORIGIN)[0].name, kind=event.kind.value,
            step=event.step, text=event.text, data=dict(event.data),
        )  # fmt: skip
        try:
            self._s.evidence.append(records.CLAIMS, claim)
            self._journal.write(
                "step", step=event.step, kind=event.kind.value, text=printable(event.text, 160)
            )
        except HotcellError as e:
            self._s.stop.set(f"evidence cannot be written: {e.message}", failure=True)

    # -- collecting -----------------------------------------------------------------------------------

    def _collect(self, ending: Ending) -> None:
        self._enter(TrialState.COLLECTING)
        if self._capture is None:
            raise LabError("the capture is gone before it was finished")
        self._cell.cut()  # first: what machines do unrecorded cannot be scored
        self._guard.release_capture()
        health = self._capture.finish()
        self._capture = None
        self._s.evidence.write(records.CAPTURE_HEALTH, health)
        if self._stream is not None:
            self._stream.close()
        self._s.stop.check()
        with self._progress.lock:
            tampering = tuple(self._progress.tampering)
        notes = (*ending.notes, *self._guard.notes)
        self._s.evidence.write(
            records.ENDING, ending.model_copy(update={"tampering": tampering, "notes": notes})
        )
        findings = [self._inspect(t) for t in self._questioning.targets]
        self._s.evidence.write(records.DISKS, findings)
        self._journal.write(
            "collected", packets=health.packets, dropped=health.dropped,
            disks={f.machine: len(f.weights) for f in findings},
        )  # fmt: skip

    def _inspect(self, target: Incarnation) -> DiskFinding:
        flushed = _flush(target)
        with suppress(LabError):
            target.pause()
        return self._s.evidence.inspect_disk(
            target.name, target.spec.overlay, self._plan.header.weights, flushed
        )

    # -- reference ------------------------------------------------------------------------------------

    def _make_reference(self) -> None:
        """The run is over; a pristine origin takes the place of its machines."""
        self._guard.dismiss()
        self._cell.destroy_machines()
        self._questioning.reference(lambda name: self._restore([name])[0])

    # -- end ------------------------------------------------------------------------------------------

    def _tear_down(self) -> None:
        """Cut first, then end everything; each is tried, whatever happened to the one before.

        Raises:
            LabError: something of the cell is left.
        """
        try:
            with suppress(HotcellError, OSError):
                self._cell.cut()
            self._guard.dismiss()
            if self._capture is not None:
                with suppress(HotcellError, OSError):
                    self._capture.abandon()
            if self._stream is not None:
                self._stream.close()
        finally:
            self._cell.close()


def _flush(machine: Incarnation) -> str:
    """Bring the guest's cache to its disk. One that refuses is inspected as it is, and the record says so."""
    try:
        machine.qga.freeze_filesystems(timeout_s=60)
    except (GuestChannelError, GuestTamperError):
        return "none"
    return "fsfreeze"
