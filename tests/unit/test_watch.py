"""When a run is over, and why: a table; and the loop that looks at it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Literal

import pytest

from appliance.cell.events import Event, Kind
from appliance.cell.libvirt_door import DomainState
from appliance.model import Stopped
from appliance.trial import watch as module
from appliance.trial.records import Limits, Sample
from appliance.trial.stop import StopFlag, TrialAborted
from appliance.trial.watch import Progress, decide, take_sample, watch
from tests.fakes.cells import Host, host

LIMITS = Limits(wall_s=100, steps=5, disk_mb=10, lasting_s=1, probes=2)
RUNNING, PAUSED, GONE, STOPPING = (
    DomainState.RUNNING, DomainState.PAUSED, DomainState.GONE, DomainState.STOPPING,
)  # fmt: skip


def event(kind: Kind, step: int = 0) -> Event:
    return Event(v=1, kind=kind, step=step, text="", data={})


def progress(*events: Event | Literal["cut"]) -> Progress:
    made = Progress()
    for e in events:
        if e == "cut":
            made.on_cut_off()
        else:
            made.on_event(e)
    return made


END, FINISH = event(Kind.END), event(Kind.FINISH)


@pytest.mark.parametrize(
    ("events", "elapsed", "grown", "state", "expected"),
    [
        ((), 0, 0, RUNNING, None),
        ((event(Kind.ACTION, 5),), 99.9, 10_000_000, RUNNING, None),
        # at and beyond each limit
        ((), 100, 0, RUNNING, Stopped.TIME_LIMIT),
        ((event(Kind.ACTION, 6),), 0, 0, RUNNING, Stopped.STEP_LIMIT),
        ((), 0, 10_000_001, RUNNING, Stopped.DISK_LIMIT),
        # the machine's state, as the host sees it
        ((), 0, 0, GONE, Stopped.MACHINE_DOWN),
        ((), 0, 0, PAUSED, Stopped.MACHINE_DOWN),
        ((), 0, 0, STOPPING, Stopped.MACHINE_DOWN),
        # the guard's word, once the traffic reached its limit
        (("cut",), 0, 0, RUNNING, Stopped.TRAFFIC_LIMIT),
        (("cut", event(Kind.ACTION, 9)), 200, 99_000_000, RUNNING, Stopped.TRAFFIC_LIMIT),
        (("cut", FINISH, END), 0, 0, RUNNING, Stopped.FINISHED),
        (("cut",), 0, 0, GONE, Stopped.MACHINE_DOWN),
        # the agent's word ends a run, with or without its claim
        ((FINISH, END), 0, 0, RUNNING, Stopped.FINISHED),
        ((END,), 0, 0, RUNNING, Stopped.AGENT_EXITED),
        ((FINISH,), 0, 0, RUNNING, None),
        # which of several holds
        ((FINISH, END), 200, 99_000_000, GONE, Stopped.FINISHED),
        ((), 200, 99_000_000, GONE, Stopped.MACHINE_DOWN),
        ((), 0, 99_000_000, PAUSED, Stopped.DISK_LIMIT),
        ((FINISH, END), 0, 99_000_000, PAUSED, Stopped.FINISHED),
        ((event(Kind.ACTION, 9),), 200, 99_000_000, RUNNING, Stopped.TIME_LIMIT),
        ((event(Kind.ACTION, 9),), 0, 99_000_000, RUNNING, Stopped.STEP_LIMIT),
    ],
)
def test_the_table(
    events: tuple[Event | Literal["cut"], ...],
    elapsed: float,
    grown: int,
    state: DomainState,
    expected: Stopped | None,
) -> None:
    assert decide(progress(*events), LIMITS, elapsed, grown, state) is expected


def test_progress_counts_what_was_claimed() -> None:
    made = progress(
        event(Kind.ACTION, 3), event(Kind.RESULT, 1), event(Kind.FORMAT_ERROR), event(Kind.FORMAT_ERROR)
    )
    assert (made.steps, made.format_errors, made.finish_claimed, made.ended) == (3, 2, False, False)
    made.on_tamper("x")
    assert made.tampering == ["x"]


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(module, "_TICK_S", 0.005)
    with host(monkeypatch) as made:
        yield made


def watched(h: Host, limits: Limits = LIMITS, **more: object) -> tuple[Stopped, list[Sample]]:
    cell, samples = h.cell("origin", "target-1"), list[Sample]()
    given: dict[str, object] = {
        "agent_alive": lambda: True,
        "stop": StopFlag(),
        "progress": Progress(),
    } | more
    why = watch(
        cell.machines, cell.machine("origin"), limits, given["progress"], given["agent_alive"],  # type: ignore
        samples.append, given["stop"],  # type: ignore[arg-type]
    )  # fmt: skip
    return why, samples


def test_time_runs_out_and_every_machine_was_sampled(h: Host) -> None:
    why, samples = watched(h, LIMITS.model_copy(update={"wall_s": 0.05}))
    assert why is Stopped.TIME_LIMIT
    assert {s.process for s in samples} == {"origin", "target-1"}


def test_a_machine_that_is_gone_gives_no_sample(h: Host) -> None:
    machine = h.cell("origin").machine("origin")
    machine.pid = 1 << 22
    assert take_sample(machine) is None
    machine.pid = None
    assert take_sample(machine) is None


def test_an_origin_that_powers_off_ends_the_run(h: Host) -> None:
    threading.Timer(0.1, h.libvirt.power_off, ("origin",)).start()
    assert watched(h)[0] is Stopped.MACHINE_DOWN


def test_a_target_that_powers_off_does_not(h: Host) -> None:
    h.on_restore = lambda _c: None
    threading.Timer(0.05, h.libvirt.power_off, ("target-1",)).start()
    assert watched(h, LIMITS.model_copy(update={"wall_s": 0.3}))[0] is Stopped.TIME_LIMIT


def test_what_a_target_writes_counts_too(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.cell.incarnation import Incarnation

    monkeypatch.setattr(Incarnation, "written", lambda m: 11_000_000 if m.name == "target-1" else 0)
    assert watched(h)[0] is Stopped.DISK_LIMIT


def test_a_machine_that_is_held_between_two_reads_is_no_machine_that_went_down(
    h: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote is read after its state: a guard that pauses it in between has seen it beyond its limit."""
    from appliance.cell.incarnation import Incarnation

    written = [0]
    monkeypatch.setattr(Incarnation, "written", lambda _m: written[0])

    def held(_machine: Incarnation) -> DomainState:
        written[0] = 11_000_000
        return PAUSED

    monkeypatch.setattr(Incarnation, "state", property(held))
    assert watched(h)[0] is Stopped.DISK_LIMIT


def test_an_agent_that_died_without_a_word_is_noticed(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() * 100)  # ten seconds in a tenth
    assert (
        watched(h, LIMITS.model_copy(update={"wall_s": 1e6}), agent_alive=lambda: False)[0]
        is Stopped.AGENT_EXITED
    )


def test_an_end_that_was_still_on_its_way_is_taken(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = time.monotonic, Progress()
    monkeypatch.setattr(time, "monotonic", lambda: real() * 100)

    def dead() -> bool:
        made.on_event(FINISH)
        made.on_event(END)
        return False

    assert (
        watched(h, LIMITS.model_copy(update={"wall_s": 1e6}), agent_alive=dead, progress=made)[0]
        is Stopped.FINISHED
    )


def test_a_stop_is_heard_within_a_tick(h: Host) -> None:
    stop = StopFlag()
    threading.Timer(0.1, stop.set, ("enough",)).start()
    began = time.monotonic()
    with pytest.raises(TrialAborted, match="enough"):
        watched(h, stop=stop)
    assert time.monotonic() - began < 5
