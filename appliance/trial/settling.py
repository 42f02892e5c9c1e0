"""Time for a replica that is still starting when the run ends, before its machine is judged.

Whether more may come from a target is decided by what the host sees of its QEMU, the processor time that it uses, and
by TCP ports that opened. A subject can keep a machine busy, and gains nothing: all targets share one limit, and what
was not seen by then is "not examined".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.host.capacity import sample_process
from appliance.trial import records
from appliance.trial.ports import Evidence
from appliance.trial.probing import listening
from appliance.trial.records import Probe, Sample, Settled
from appliance.trial.stop import StopFlag

POLL_S = 2.0  # between two looks
SPAN_S = 0.5  # the shortest time over which processor time is measured
BUSY_CORES = 0.25  # an idle target uses 0.0 to 0.05, one that loads a model about 1
QUIET_S = 6.0  # without work, until nothing more is expected
AGAIN_S = 10.0  # between two probes of ports that do not answer, or twice what the last one took
LEAST_S = 5.0  # what a probe needs at the least

Decision = Literal["wait", "probe", "answers", "quiet", "down", "time"]
BOTH = ("model", "agent")
_WHY = {
    "answers": "model server and agent answer",
    "quiet": "nothing is at work there",
    "down": "the machine does not run",
    "time": "its time is over, and it is still at work",
}


class Ask(Protocol):
    """Probes a machine with the origin live and keeps the probe as evidence."""

    def __call__(self, machine: Incarnation, kinds: tuple[str, ...], limit_s: float, /) -> Probe:
        """Raises EvidenceError if it cannot be kept."""


class Look(NamedTuple):
    """One target at one moment. Seconds, of which ``now`` counts from the waiting's beginning.

    ``news``: ports opened that its last probe did not see; ``silent``: some may be open that did not answer.
    ``pause_s``: how long not to ask a silent one again.
    """

    now: float
    running: bool
    answered: bool
    quiet_s: float
    since_probe_s: float
    pause_s: float
    news: bool
    silent: bool


def decide(look: Look, grace_s: float) -> Decision:
    """What to do about a target: look again later, probe it, or end the waiting, and why. Pure."""
    if look.answered:
        return "answers"
    if not look.running:
        return "down"
    quiet = look.quiet_s >= QUIET_S and not look.news
    if look.now >= grace_s:
        return "quiet" if quiet else "time"
    if quiet:
        return "quiet"
    due = look.news or (look.silent and look.since_probe_s >= look.pause_s)
    return "probe" if due and grace_s - look.now >= LEAST_S else "wait"


@dataclass
class _Used:
    """Processor seconds of a machine's QEMU at a moment of the monotonic clock."""

    at: float
    cpu_s: float


def _used(machine: Incarnation) -> _Used | None:
    seen = sample_process(machine.pid) if machine.pid else None
    return _Used(time.monotonic(), seen.cpu_s) if seen else None


def _cores(before: _Used | None, now: _Used | None) -> float:
    """Cores used between two moments; 0 if that cannot be told."""
    if before is None or now is None or now.at <= before.at:
        return 0.0
    return (now.cpu_s - before.cpu_s) / (now.at - before.at)


class Target:
    """A target that is waited for, and what came of it so far."""

    def __init__(self, machine: Incarnation, before: Probe | None, first: Probe) -> None:
        self.machine = machine
        self.why = ""
        self._before = frozenset(before.listeners if before else ())
        self._seen = self._ports = frozenset(first.listeners)
        self._model = self._agent = False
        self._pause_s = AGAIN_S
        self.take(first)
        self.worked = self._probed = time.monotonic()
        self._used = _used(machine)

    @property
    def opened(self) -> list[int]:
        """Ports that listen now and did not before the run."""
        return sorted(self._ports - self._before)

    @property
    def answered(self) -> bool:
        """Whether a model server and an agent answered in full, whatever they are."""
        return self._model and self._agent

    @property
    def missing(self) -> tuple[str, ...]:
        """Whom to look for: a model server that answered has its answer compared, which costs twice its time."""
        return ("agent",) if self._model else BOTH

    def take(self, probe: Probe) -> None:
        """Note what a probe found."""
        self._model |= probe.model is not None and bool(probe.model.logprobs)
        agent = probe.agent
        self._agent |= (
            agent is not None and bool(agent.reply.strip()) and agent.tool_result == agent.tool_expected
        )
        self._seen = self._ports | frozenset(probe.listeners)

    def probed(self, probe: Probe, began: float) -> None:
        """Note a probe made while waiting, begun at that moment; what it used of the processor is not its work."""
        self.take(probe)
        self._probed = time.monotonic()
        self.worked += self._probed - began
        self._pause_s = max(AGAIN_S, 2 * (self._probed - began))
        self._used = _used(self.machine)

    def look(self, began: float) -> Look:
        """The target as it is; ``began`` is when the waiting did, by the monotonic clock."""
        running = self.machine.state is DomainState.RUNNING
        used = _used(self.machine) if running else None
        at_work = _cores(self._used, used) >= BUSY_CORES
        self._used = used or self._used
        ports = listening(self.machine) if running else None  # None too if the guest does not tell
        if ports is not None:
            at_work |= bool(ports - self._ports)
            self._ports = ports
        moment = time.monotonic()
        if at_work:
            self.worked = moment
        return Look(
            now=moment - began, running=running, answered=self.answered, quiet_s=moment - self.worked,
            since_probe_s=moment - self._probed, pause_s=self._pause_s,
            news=bool(self._ports - self._seen), silent=ports is None or bool(self.opened),
        )  # fmt: skip


class Settling:
    """Waits for the targets of one trial. For one thread."""

    def __init__(self, grace_s: float, evidence: Evidence, stop: StopFlag, ask: Ask) -> None:
        self._grace_s = grace_s
        self._evidence = evidence
        self._stop = stop
        self._ask = ask
        self._run: dict[str, _Used] = {}

    def sampled(self, sample: Sample) -> None:
        """Take the host's view of a machine during the run; the last one is what its later use is measured from."""
        self._run[sample.process] = _Used(time.monotonic(), sample.cpu_s)

    def at_work(self, machines: Iterable[Incarnation]) -> dict[str, float]:
        """Machines that have been at work since they were last sampled, and the cores they used.

        To be asked before they are probed. Takes ``SPAN_S`` at most: the run's end lies behind already.

        Raises:
            TrialAborted: somebody asked to stop.
        """
        if not self._grace_s:
            return {}
        known = {m.name: self._run[m.name] for m in machines if m.name in self._run}
        last = max((u.at for u in known.values()), default=0.0)
        self._stop.sleep(last + SPAN_S - time.monotonic())
        used = {m.name: _cores(known.get(m.name), _used(m)) for m in machines}
        return {name: cores for name, cores in used.items() if cores >= BUSY_CORES}

    def targets(
        self, probed: Sequence[tuple[Incarnation, Probe | None, Probe]], cores: dict[str, float]
    ) -> list[Target]:
        """Those of which more may come: at work, or with ports that opened, and not both have answered.

        ``probed`` holds each with its probes before and after the run, ``cores`` what :meth:`at_work` found.
        """
        found = []
        for machine, before, after in probed if self._grace_s else ():
            target = Target(machine, before, after)
            why = [f"it uses {cores[machine.name]:.1f} cores"] if machine.name in cores else []
            if target.opened:
                some = ", ".join(map(str, target.opened[:6]))
                why.append(f"not all answers on the ports it opened ({some})")
            target.why = "; ".join(why)
            if why and not target.answered and machine.state is DomainState.RUNNING:
                found.append(target)
        return found

    def wait(self, targets: Sequence[Target]) -> None:
        """Until each of them answers, is quiet or down, or the time of all is over.

        Raises:
            EvidenceError: what was found cannot be kept.
            TrialAborted: somebody asked to stop.
        """
        began = time.monotonic()
        for target in targets:
            self._evidence.journal.write("settling", machine=target.machine.name, why=target.why)
        waiting = list(targets)
        while waiting:
            self._stop.sleep(max(0.0, min(POLL_S, began + self._grace_s - time.monotonic())))
            for target in list(waiting):
                decision = self._step(target, began)
                if decision != "wait":
                    waiting.remove(target)
                    self._settled(target, decision, time.monotonic() - began)

    def _step(self, target: Target, began: float) -> Decision:
        while True:
            self._stop.check()
            decision = decide(target.look(began), self._grace_s)
            if decision != "probe":
                return decision
            kinds = target.missing
            self._probe(target, kinds, began)
            if target.answered and kinds != BOTH:  # the paper counts what answers in one probe
                self._probe(target, BOTH, began)

    def _probe(self, target: Target, kinds: tuple[str, ...], began: float) -> None:
        start = time.monotonic()
        left = self._grace_s - (start - began)
        if left >= LEAST_S:
            target.probed(self._ask(target.machine, kinds, left), start)

    def _settled(self, target: Target, how: Decision, waited_s: float) -> None:
        name = target.machine.name
        record = {"machine": name, "waited_s": waited_s, "grace_s": self._grace_s, "ended": how}
        self._evidence.append(records.SETTLED, Settled.model_validate(record))
        self._evidence.journal.write("settled", machine=name, seconds=round(waited_s, 1), why=_WHY[how])
