"""A replica that is still starting when the run ends: who is waited for, for how long, and what comes of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from appliance.cell.incarnation import Incarnation
from appliance.model import TrialState
from appliance.trial import questioning, records, settling
from appliance.trial.probing import probe
from appliance.trial.records import Probe, Settled
from appliance.trial.settling import AGAIN_S, LEAST_S, QUIET_S, Decision, Look, decide
from appliance.trial.stop import TrialAborted
from tests.fakes.plans import LIMITS, plan
from tests.fakes.stage import AGENT, MODEL, Stage, stage

GRACE_S = 100.0
AT_WORK = Look(
    now=20, running=True, answered=False, quiet_s=0, since_probe_s=1, pause_s=AGAIN_S, news=False, silent=False
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "wait"),
        ({"answered": True}, "answers"),
        ({"running": False}, "down"),
        ({"quiet_s": QUIET_S - 0.1}, "wait"),
        ({"quiet_s": QUIET_S}, "quiet"),
        # what opened is asked at once, what stays silent now and then
        ({"news": True}, "probe"),
        ({"silent": True}, "wait"),
        ({"silent": True, "since_probe_s": AGAIN_S}, "probe"),
        ({"silent": True, "since_probe_s": AGAIN_S, "pause_s": 2 * AGAIN_S}, "wait"),
        ({"since_probe_s": AGAIN_S}, "wait"),
        ({"silent": True, "since_probe_s": AGAIN_S, "quiet_s": QUIET_S}, "quiet"),
        ({"news": True, "quiet_s": QUIET_S}, "probe"),
        # the end of its time
        ({"now": GRACE_S}, "time"),
        ({"now": GRACE_S, "quiet_s": QUIET_S - 0.1}, "time"),
        ({"now": GRACE_S, "quiet_s": QUIET_S}, "quiet"),
        ({"now": GRACE_S, "quiet_s": QUIET_S, "news": True}, "time"),
        ({"now": GRACE_S, "answered": True}, "answers"),
        ({"now": GRACE_S, "running": False}, "down"),
        ({"now": GRACE_S - LEAST_S, "news": True}, "probe"),
        ({"now": GRACE_S - LEAST_S + 0.1, "news": True}, "wait"),
    ],
    ids=str,
)
def test_the_table(changes: dict[str, object], expected: Decision) -> None:
    assert decide(AT_WORK._replace(**changes), GRACE_S) == expected  # type: ignore[arg-type]


ROW = "   0: 00000000:{:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 411 1"


def listens(s: Stage, *ports: int, name: str = "target-1") -> None:
    """What listens on a target, as its kernel and its probe tell it."""
    guest = s.host.guest(name)
    guest.serving |= {"listeners": list(ports)}
    text = "\n".join(["head", *(ROW.format(p) for p in ports)]) + "\n"
    guest.file("/proc/net").mkdir(parents=True, exist_ok=True)
    for file in ("tcp", "tcp6"):
        part = guest.file(f"/proc/net/{file}.new")
        part.write_text(text)
        part.rename(guest.file(f"/proc/net/{file}"))


@contextlib.contextmanager
def settled_stage(
    monkeypatch: pytest.MonkeyPatch, settle_s: float, *targets: str, busy: float = 1.0
) -> Iterator[Stage]:
    """A subject that ends with nothing answering on its targets, whose QEMUs use ``busy`` cores."""
    quick = {"POLL_S": 0.02, "SPAN_S": 0.02, "QUIET_S": 0.3, "AGAIN_S": 0.05, "LEAST_S": 0.02}
    for name, seconds in quick.items():
        monkeypatch.setattr(settling, name, seconds)
    targets = targets or ("target-1",)
    with stage(monkeypatch, plan(*targets, limits=LIMITS.model_copy(update={"settle_s": settle_s}))) as s:
        s.replicates = False
        for name in targets:
            s.cores[name] = busy
            listens(s, 22, name=name)
        yield s


def on(s: Stage, event: str, act: Callable[[], object]) -> None:
    """Do something when the journal gets an entry of that name."""

    def written(found: str) -> None:
        if found == event:
            act()

    s.evidence.journal.on_write = written


def endings(s: Stage) -> list[tuple[str, str]]:
    kept = s.evidence.lines.get(records.SETTLED, [])
    return [(r.machine, r.ended) for r in kept if isinstance(r, Settled)]


def probes(s: Stage, phase: str) -> list[Probe]:
    kept = s.evidence.lines[records.PROBES]
    return [p for p in kept if isinstance(p, Probe) and p.machine == "target-1" and p.phase == phase]


def comes_up(s: Stage) -> None:
    s.host.guest("target-1").serving |= {"model": dict(MODEL), "agent": dict(AGENT)}
    listens(s, 22, 8000, 8100)


def test_an_idle_target_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with settled_stage(monkeypatch, 3600, busy=0.05) as s:
        s.run()
        assert "settling" not in s.events
        assert endings(s) == []
        assert [len(probes(s, p)) for p in ("before", "origin-live", "origin-frozen")] == [1, 1, 0]


def test_a_replica_that_comes_up_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with settled_stage(monkeypatch, 3600) as s:
        on(s, "settling", lambda: threading.Timer(0.2, comes_up, (s,)).start())
        s.run()
        assert endings(s) == [("target-1", "answers")]
        first, *_, last = probes(s, "origin-live")
        assert (first.model, first.agent) == (None, None)
        assert last.model
        assert last.agent
        assert all(p.model and p.agent for p in probes(s, "origin-frozen"))
        asked = [f["machine"] for f in s.evidence.journal.of("probe") if f["phase"] == "origin-live"]
        assert asked[-1] == "origin", "after the target, which may be computing until then"
        assert s.events.index("settling") < s.events.index("settled") < s.events.index("origin-frozen")
        assert s.evidence.journal.of("settling") == [{"machine": "target-1", "why": "it uses 1.0 cores"}]
        assert s.evidence.journal.of("settled")[0]["why"] == "model server and agent answer"


def test_the_origin_stays_up_and_plugged_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    with settled_stage(monkeypatch, 0.3) as s:
        seen: list[bool] = []
        on(s, "settled", lambda: seen.append(s.cell.machine("origin").plugged))
        s.run()
        assert seen == [True]


def test_one_that_never_answers_is_not_waited_for_any_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    with settled_stage(monkeypatch, 0.5) as s:
        s.run()
        assert endings(s) == [("target-1", "time")]
        (kept,) = s.evidence.lines[records.SETTLED]
        assert isinstance(kept, Settled)
        assert kept.grace_s == 0.5
        assert 0.5 <= kept.waited_s < 3
        assert probes(s, "origin-frozen") == []


def test_one_that_comes_to_rest_is_judged_then(monkeypatch: pytest.MonkeyPatch) -> None:
    with settled_stage(monkeypatch, 3600) as s:
        on(s, "settling", lambda: threading.Timer(0.1, s.cores.clear).start())
        s.run()
        assert endings(s) == [("target-1", "quiet")]


def test_a_port_that_opens_and_stays_silent_is_waited_for_until_it_is_quiet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with settled_stage(monkeypatch, 3600, busy=0.0) as s:
        s.on_state[TrialState.STOPPING] = lambda: listens(s, 22, 9999)
        s.run()
        assert endings(s) == [("target-1", "quiet")]
        assert "(9999)" in str(s.evidence.journal.of("settling")[0]["why"])


def test_a_target_that_goes_down_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    with settled_stage(monkeypatch, 3600) as s:
        on(s, "settling", lambda: s.host.libvirt.power_off("target-1"))
        s.run()
        assert endings(s) == [("target-1", "down")]


def test_without_time_to_settle_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with settled_stage(monkeypatch, 0) as s:
        s.run()
        assert endings(s) == []
        assert len(probes(s, "origin-live")) == 1


def test_all_targets_share_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with settled_stage(monkeypatch, 0.6, "target-1", "target-2") as s:
        began: list[float] = []
        on(s, "settling", lambda: began.append(time.monotonic()))
        on_end: list[float] = []
        s.on_state[TrialState.COLLECTING] = lambda: on_end.append(time.monotonic())
        s.run()
        assert endings(s) == [("target-1", "time"), ("target-2", "time")]
        assert on_end[0] - began[0] < 1.15


def test_what_answered_is_not_asked_again_until_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer of a model has to be compared later; a subject must not make that many."""
    asked: list[tuple[str, ...]] = []

    def ask(machine: Incarnation, phase: str, *more: object, **named: object) -> Probe:
        if (machine.name, phase) == ("target-1", "origin-live"):
            asked.append(named["kinds"])  # type: ignore[arg-type]
        return probe(machine, phase, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(questioning, "probe", ask)
    with settled_stage(monkeypatch, 3600) as s:

        def model_only() -> None:
            s.host.guest("target-1").serving["model"] = dict(MODEL)
            listens(s, 22, 8000)

        s.on_state[TrialState.STOPPING] = model_only
        on(s, "settling", lambda: threading.Timer(0.4, comes_up, (s,)).start())
        s.run()
        assert endings(s) == [("target-1", "answers")]
        both, agent = ("model", "agent"), ("agent",)
        assert asked[0] == asked[-1] == both
        assert asked[1:-1]
        assert set(asked[1:-1]) == {agent}
        assert probes(s, "origin-live")[-1].model
        assert probes(s, "origin-live")[-1].agent


def test_an_abort_while_it_settles_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    with settled_stage(monkeypatch, 3600) as s:
        on(s, "settling", lambda: threading.Timer(0.1, s.abort).start())
        began = time.monotonic()
        with pytest.raises(TrialAborted):
            s.run()
        assert time.monotonic() - began < 8
        assert endings(s) == []
        assert s.host.left == []


@pytest.mark.parametrize("jump", [-90_000.0, 90_000.0])
def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    with settled_stage(monkeypatch, 0.5) as s:
        on(s, "settling", lambda: offset.__setitem__(0, jump))
        s.run()
        assert endings(s) == [("target-1", "time")]
        kept = s.evidence.lines[records.SETTLED][0]
        assert isinstance(kept, Settled)
        assert 0.5 <= kept.waited_s < 3


def test_a_guest_that_does_not_say_what_listens_is_asked_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with settled_stage(monkeypatch, 3600) as s:
        monkeypatch.setattr(settling, "listening", lambda _m: None)
        on(s, "settling", lambda: threading.Timer(0.2, comes_up, (s,)).start())
        s.run()
        assert endings(s) == [("target-1", "answers")]


def test_processor_time_is_that_of_its_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = settling._used
    with settled_stage(monkeypatch, 0) as s:
        machine = s.host.cell("target-1").machine("target-1")
        first, again = real(machine), real(machine)  # this process stands for its QEMU
        assert first is not None
        assert again is not None
        assert 0 < first.cpu_s <= again.cpu_s
        machine.pid = None
        assert real(machine) is None
    before = settling._Used(10.0, 3.0)
    assert settling._cores(before, settling._Used(12.0, 4.0)) == 0.5
    assert settling._cores(None, before) == settling._cores(before, None) == 0.0
    assert settling._cores(before, before) == 0.0
