"""Watching the subject's run from outside, and deciding when it is over.

What the agent reports is taken as a claim. The decision to stop rests on the agent's own FINISH (nothing
is gained by a subject that stops early), on limits measured by the host, or on the machine going down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from appliance.cell import overlay
from appliance.cell.events import Event, Kind
from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.host.capacity import sample_process
from appliance.model import Stopped
from appliance.trial.records import Limits, Sample
from appliance.trial.stop import StopFlag

_TICK_S = 0.25
_SAMPLE_S = 2.0
_ALIVE_S = 10.0
_MB = 1_000_000


@dataclass
class Progress:
    """What the event stream claimed so far; written by the reader's thread, read by the watcher.

    ``cut_off`` is the guard's word: the subject's traffic reached its limit.
    """

    steps: int = 0
    format_errors: int = 0
    finish_claimed: bool = False
    ended: bool = False
    cut_off: bool = False
    tampering: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def on_event(self, event: Event) -> None:
        """Take one event into account."""
        with self.lock:
            self.steps = max(self.steps, event.step)
            self.format_errors += event.kind is Kind.FORMAT_ERROR
            self.finish_claimed |= event.kind is Kind.FINISH
            self.ended |= event.kind is Kind.END

    def on_cut_off(self) -> None:
        """The subject sent all that it may."""
        with self.lock:
            self.cut_off = True

    def on_tamper(self, what: str) -> None:
        """Note a line that no honest agent sends."""
        with self.lock:
            self.tampering.append(what)


def decide(
    progress: Progress, limits: Limits, elapsed_s: float, grown: int, origin: DomainState
) -> Stopped | None:
    """Whether the run is over, and why. Pure but for reading ``progress``."""
    with progress.lock:
        if progress.ended:
            return Stopped.FINISHED if progress.finish_claimed else Stopped.AGENT_EXITED
        steps, cut_off = progress.steps, progress.cut_off
    beyond = grown > limits.disk_mb * _MB
    if origin is DomainState.PAUSED and beyond:
        return Stopped.DISK_LIMIT  # paused by the guard, which holds a machine at its limit
    if origin is not DomainState.RUNNING:
        return Stopped.MACHINE_DOWN
    if cut_off:
        return Stopped.TRAFFIC_LIMIT
    if elapsed_s >= limits.wall_s:
        return Stopped.TIME_LIMIT
    if steps > limits.steps:
        return Stopped.STEP_LIMIT
    return Stopped.DISK_LIMIT if beyond else None


def take_sample(machine: Incarnation) -> Sample | None:
    """The host's view of one machine's QEMU now; None if it is gone."""
    seen = sample_process(machine.pid) if machine.pid else None
    if seen is None:
        return None
    return Sample(
        at=time.time(), process=machine.name, cpu_s=seen.cpu_s, rss=seen.rss, own=seen.own,
        disk_read=seen.disk_read, disk_write=seen.disk_write,
        overlay=overlay.used_bytes(machine.spec.overlay),
    )  # fmt: skip


def watch(
    machines: dict[str, Incarnation],
    origin: Incarnation,
    limits: Limits,
    progress: Progress,
    agent_alive: Callable[[], bool],
    on_sample: Callable[[Sample], None],
    stop: StopFlag,
) -> Stopped:
    """Watch until the run is over.

    ``agent_alive`` is asked every few seconds and answers for the agent's process on the origin; it is the
    guest's word, good enough to stop waiting for an agent that died without a word. The guest decides how long
    that takes, so somebody else has to hold the machines to their disk limit meanwhile.
    """

    def look(elapsed: float) -> Stopped | None:
        state = origin.state  # first: one that is found paused for what it wrote has written it by then
        return decide(progress, limits, elapsed, max(m.written() for m in machines.values()), state)

    began, next_sample, next_alive = time.monotonic(), 0.0, _ALIVE_S
    while True:
        elapsed = time.monotonic() - began
        if elapsed >= next_sample:
            next_sample = elapsed + _SAMPLE_S
            for machine in machines.values():
                sample = take_sample(machine)
                if sample is not None:
                    on_sample(sample)
        over = look(elapsed)
        if over is None and elapsed >= next_alive:
            next_alive = elapsed + _ALIVE_S
            if not agent_alive():
                # An end event may still be on its way through the port.
                stop.sleep(1.0)
                over = look(elapsed) or Stopped.AGENT_EXITED
        if over is not None:
            return over
        stop.sleep(_TICK_S)
