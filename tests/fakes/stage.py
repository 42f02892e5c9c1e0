"""Everything a trial's run needs, in memory: a host, guests, evidence, and an agent that talks."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.isolation import SealFact
from appliance.errors import HotcellError
from appliance.model import TrialState
from appliance.trial import guard, settling, watch
from appliance.trial.plan import Plan
from appliance.trial.records import Sample
from appliance.trial.runner import Setting, TrialRun
from appliance.trial.stop import StopFlag
from tests.fakes.cells import Host, host
from tests.fakes.evidence import FakeEvidence
from tests.fakes.plans import plan

LOGPROBS = [-0.5 - n / 7 for n in range(12)]
MODEL = {"port": 8000, "model": "subject", "logprobs": LOGPROBS, "pid": 5, "process_start": 99}
AGENT = {"port": 8100, "reply": "yes", "tool_result": "honest", "pid": 6, "process_start": 98}
TALK = ("start", "action", "result", "finish", "end")


def event_line(kind: str, step: int = 1, **changes: object) -> bytes:
    """One honest line of an agent."""
    return (
        json.dumps({"v": 1, "kind": kind, "step": step, "text": kind, "data": {}} | changes).encode() + b"\n"
    )


class EventPort:
    """QEMU's end of a guest's event port: the runner connects, the agent's lines come out."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._sending: list[threading.Thread] = []

    def send(self, *lines: bytes) -> None:
        """Send to whoever connects, without waiting."""
        thread = threading.Thread(target=self._send, args=(lines,))
        thread.start()
        self._sending.append(thread)

    def _send(self, lines: tuple[bytes, ...]) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            with connection:
                for line in lines:
                    connection.sendall(line)
                connection.recv(1)  # until the runner hangs up

    def close(self) -> None:
        """No more; wait for what is being sent."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._sending:
            thread.join(10)
            assert not thread.is_alive()


class Stage:
    """One run. ``talk`` is what the agent says; ``replicates`` whether the target serves afterwards."""

    def __init__(self, made: Host, given: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "_TICK_S", 0.005)
        monkeypatch.setattr(guard, "_TICK_S", 0.005)
        monkeypatch.setattr(settling, "_used", self._used)
        sample = watch.take_sample
        monkeypatch.setattr(watch, "take_sample", lambda m: self._sampled(m, sample(m)))
        self.cores: dict[str, float] = {}
        self.host = made
        self.plan = given
        self.evidence = FakeEvidence(made.paths.open_trials)
        self.stop = StopFlag()
        self.states: list[TrialState] = []
        self.talk = [event_line(k) for k in TALK]
        self.replicates = True
        self.seal = [SealFact(name="sealed", passed=True, found="")]
        self.cell = Cell(given.id, made.shop)
        self.on_state: dict[TrialState, object] = {}
        self.ports: list[EventPort] = []
        made.on_restore = self._restored
        made.guest("origin").serving |= {"model": dict(MODEL)}
        made.guest("origin").on_agent = lambda _argv: self._start()

    def _used(self, machine: Incarnation) -> settling._Used:
        """A machine's QEMU uses as many cores as ``cores`` says, else none."""
        now = time.monotonic()
        return settling._Used(now, now * self.cores.get(machine.name, 0.0))

    def _sampled(self, machine: Incarnation, sample: Sample | None) -> Sample | None:
        return sample.model_copy(update={"cpu_s": self._used(machine).cpu_s}) if sample else None

    def _restored(self, clone: Incarnation) -> None:
        if clone.name == "origin":
            self.ports.append(EventPort(clone.spec.events_socket))

    def _start(self) -> None:
        self.ports[-1].send(*self.talk)
        if self.replicates:
            for name in (m.name for m in self.plan.machines if m.name.startswith("target-")):
                self.host.guest(name).serving |= {"model": dict(MODEL), "agent": dict(AGENT)}

    def enter(self, state: TrialState) -> None:
        """What the desk is told; a test may act on it."""
        self.states.append(state)
        action = self.on_state.get(state)
        if action is not None:
            action()  # type: ignore[operator]

    def abort(self, reason: str = "aborted on request") -> None:
        """As the desk aborts a trial."""
        self.stop.set(reason)
        with contextlib.suppress(HotcellError):
            self.cell.condemn()

    def run(self) -> None:
        """Run the plan."""
        setting = Setting(
            cell=self.cell, baselines={m.name: self.host.baseline(m.name) for m in self.plan.machines},
            evidence=self.evidence, stop=self.stop, on_state=self.enter, seal_facts=lambda: self.seal,
        )  # fmt: skip
        TrialRun(self.plan, setting).run()

    @property
    def events(self) -> list[str]:
        """The journal without the agent's own steps, which come when they come."""
        return [e for e in self.evidence.journal.events if e != "step"]

    def close(self) -> None:
        for port in self.ports:
            port.close()


@contextlib.contextmanager
def stage(monkeypatch: pytest.MonkeyPatch, given: Plan | None = None) -> Iterator[Stage]:
    """A stage on a host of its own."""
    with host(monkeypatch) as made:
        ready = Stage(made, given or plan(), monkeypatch)
        try:
            yield ready
        finally:
            ready.close()
