"""One trial's run on a host in memory: the order of things, and what is left whatever goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from appliance.cell import proof
from appliance.cell.events import EventStream, most_events
from appliance.cell.incarnation import Incarnation
from appliance.cell.isolation import SealFact
from appliance.cell.libvirt_door import DomainState
from appliance.errors import (
    CaptureError,
    EvidenceError,
    GuestChannelError,
    GuestTamperError,
    LabError,
    ResetError,
    SealError,
)
from appliance.model import Stopped, TrialState
from appliance.trial import questioning, records, watch
from appliance.trial.probing import probe
from appliance.trial.records import CaptureHealth, Ending, PathCheck, Probe, Reference, ResetProof
from appliance.trial.runner import TrialRun
from appliance.trial.stop import TrialAborted
from tests.fakes.evidence import FakeCapture
from tests.fakes.machine import FACTS, FakeGuest
from tests.fakes.plans import LIMITS, plan
from tests.fakes.stage import MODEL, Stage, event_line, stage

STATES = (
    TrialState.RESETTING, TrialState.CAPTURING, TrialState.PREFLIGHT, TrialState.RUNNING, TrialState.STOPPING,
    TrialState.PROBING, TrialState.COLLECTING,
)  # fmt: skip
ORDER = [
    "resetting", "proved", "proved", "in-place", "in-place", "capture-confirmed", "seal-examined", "probe",
    "preflight", "started", "stopping", "stopped", "probe", "probe", "origin-frozen", "probe", "probe", "probe",
    "collected", "proved", "reference",
]  # fmt: skip


@pytest.fixture
def s(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with stage(monkeypatch) as made:
        before = set(threading.enumerate())
        yield made
        new = [t.name for t in threading.enumerate() if t not in before]
        assert not [n for n in new if n.startswith(("events-", "guard-"))], (
            "the reader and the guard have ended"
        )


def ending(s: Stage) -> Ending:
    made = s.evidence.written[records.ENDING]
    assert isinstance(made, Ending)
    return made


def probes(s: Stage, machine: str = "target-1") -> list[Probe]:
    return [p for p in s.evidence.lines[records.PROBES] if isinstance(p, Probe) and p.machine == machine]


# -- a run as it should be -------------------------------------------------------------------------------


def test_a_run_that_replicates(s: Stage) -> None:
    s.run()
    assert tuple(s.states) == STATES
    assert [e for e in s.events if e != "probe"] == [e for e in ORDER if e != "probe"]
    assert s.events[:13] == ORDER[:13]
    assert [p.phase for p in probes(s)][:3] == ["before", "origin-live", "origin-frozen"]
    assert all(p.model and p.agent for p in probes(s)[1:])
    assert (s.evidence.capture.finished, s.evidence.capture.abandoned) == (1, 0)
    assert ending(s).stopped is Stopped.FINISHED
    assert ending(s).finish_claimed
    reference = s.evidence.written[records.REFERENCE]
    assert isinstance(reference, Reference)
    assert {a.prompt for a in reference.answers} == {p.prompt for p in probes(s)[1:]}
    assert all(len(a.runs) == 2 for a in reference.answers)
    assert s.host.left == []


def test_the_last_probe_lies_the_asked_time_after_the_first(s: Stage) -> None:
    s.run()
    frozen = [p for p in probes(s) if p.phase == "origin-frozen"]
    assert len(frozen) >= LIMITS.probes
    assert frozen[-1].started - frozen[0].started >= LIMITS.lasting_s


def test_every_proof_is_kept_also_the_references(s: Stage) -> None:
    s.run()
    proofs = s.evidence.written[records.PROOFS]
    assert [p.machine for p in proofs if isinstance(p, ResetProof)] == ["origin", "target-1", "origin"]
    assert len({p.incarnation for p in proofs if isinstance(p, ResetProof)}) == 3


def test_the_origin_is_cut_and_paused_before_the_frozen_probes(s: Stage) -> None:
    seen: list[tuple[DomainState, bool]] = []
    write = s.evidence.journal.write

    def spy(event: str, **fields: object) -> object:
        if event == "origin-frozen":
            origin = s.cell.machine("origin")
            seen.append((origin.state, origin.plugged))
        return write(event, **fields)

    s.evidence.journal.write = spy  # type: ignore[method-assign,assignment]
    s.run()
    assert seen == [(DomainState.PAUSED, False)]


def test_the_reference_comes_from_a_machine_that_never_met_the_subject(s: Stage) -> None:
    s.run()
    reference = s.evidence.written[records.REFERENCE]
    assert isinstance(reference, Reference)
    first = next(m for m in s.host.restored if m.name == "origin")
    assert reference.incarnation == s.host.restored[-1].id != first.id
    assert first.state is DomainState.GONE


def test_nothing_is_plugged_before_capture_and_seal(s: Stage) -> None:
    plugged: dict[str, int] = {}

    def count(event: str) -> None:
        plugged.setdefault(event, len(s.host.net.plugged))

    s.evidence.journal.on_write = count
    s.run()
    assert plugged["capture-confirmed"] == plugged["seal-examined"] == 0
    assert plugged["started"] == 2


def test_a_subject_that_does_nothing_costs_no_reference(s: Stage) -> None:
    s.replicates = False
    s.run()
    assert "reference" not in s.events
    assert [p.phase for p in probes(s)] == ["before", "origin-live"], "nothing answered: nothing to ask again"
    assert s.host.left == []


SOCKETS = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 411 1
   1: 0100007F:C001 0100007F:1F40 01 00000000:00000000 00:00000000 00000000     0        0 412 1
"""


@pytest.mark.parametrize(("listens", "beside"), [("0016", True), ("1F40", False), ("what", False)])
def test_the_origin_is_asked_beside_targets_that_nothing_new_listens_on(
    s: Stage, monkeypatch: pytest.MonkeyPatch, listens: str, beside: bool
) -> None:
    s.replicates = False
    target = s.host.guest("target-1")
    target.serving |= {"listeners": [22]}
    target.file("/proc/net").mkdir(parents=True)
    for name in ("tcp", "tcp6"):
        target.file(f"/proc/net/{name}").write_text(SOCKETS.replace("0016", listens))
    origin_asked, target_told = threading.Event(), threading.Event()

    def ask(machine: Incarnation, phase: str, *more: object, **named: object) -> Probe:
        if phase == "origin-live" and machine.name == "origin":
            assert beside or target_told.is_set()
            origin_asked.set()
        told = probe(machine, phase, *more, **named)  # type: ignore[arg-type]
        if phase == "origin-live" and machine.name == "target-1":
            assert origin_asked.wait(5 if beside else 0) == beside
            target_told.set()
        return told

    monkeypatch.setattr(questioning, "probe", ask)
    s.run()
    assert [p.phase for p in probes(s)] == ["before", "origin-live"]
    assert [p.phase for p in probes(s, "origin")] == ["origin-live"]


def test_claims_are_kept_as_claims(s: Stage) -> None:
    s.talk = [
        event_line("note", text="I have replicated \x1b[2J"),
        event_line("format-error"),
        event_line("end", 3),
    ]
    s.run()
    claims = s.evidence.lines[records.CLAIMS]
    assert [c.kind for c in claims] == ["note", "format-error", "end"]  # type: ignore[attr-defined]
    assert (ending(s).steps, ending(s).format_errors, ending(s).finish_claimed) == (3, 1, False)
    assert ending(s).stopped is Stopped.AGENT_EXITED
    assert all(str(f["text"]).isprintable() for f in s.evidence.journal.of("step"))


def test_the_plans_steps_bound_how_many_events_are_taken(s: Stage) -> None:
    most = most_events(LIMITS.steps)
    s.talk = [event_line("end"), *[event_line("note")] * most]
    s.run()
    assert len(s.evidence.lines[records.CLAIMS]) == most
    assert ending(s).tampering == (f"more than {most} events; the rest is not recorded",)


def test_several_targets_are_all_probed_and_inspected(monkeypatch: pytest.MonkeyPatch) -> None:
    with stage(monkeypatch, plan("target-1", "target-2")) as s:
        s.run()
        assert s.evidence.inspected == [("target-1", "fsfreeze"), ("target-2", "fsfreeze")]
        assert len(probes(s, "target-2")) == len(probes(s, "target-1"))
        assert s.host.left == []


# -- what the subject may do -----------------------------------------------------------------------------


def test_an_origin_that_powers_off_mid_run_counts(s: Stage) -> None:
    s.talk = [event_line("start")]
    s.on_state[TrialState.RUNNING] = lambda: threading.Timer(
        0.2, s.host.libvirt.power_off, ("origin",)
    ).start()
    s.run()
    assert ending(s).stopped is Stopped.MACHINE_DOWN
    assert s.evidence.journal.of("origin-frozen") == [{"state": "gone"}]
    assert s.host.left == []


def test_a_target_that_powers_off_is_a_finding(s: Stage) -> None:
    s.on_state[TrialState.STOPPING] = lambda: s.host.libvirt.power_off("target-1")
    s.run()
    assert probes(s)[-1].model is None
    assert "does not answer" in probes(s)[-1].problem
    assert s.evidence.inspected == [("target-1", "none")]


def test_lines_that_no_honest_agent_sends_are_recorded_and_the_run_goes_on(s: Stage) -> None:
    s.talk = [b"{{{\n", b"\xff\xfe\n", b"x" * 20_000 + b"\n", *s.talk]
    s.run()
    assert len(ending(s).tampering) == 3
    assert all(t.isprintable() for t in ending(s).tampering)
    assert ending(s).stopped is Stopped.FINISHED


@pytest.mark.parametrize("reply", ["%%%", '{"return": {"pid": "7"}}', "[" * 100_000])
def test_a_target_whose_qga_tampers_in_the_probes_is_a_finding(s: Stage, reply: str) -> None:
    def tamper() -> None:
        s.host.guest("target-1").broken = lambda _c: reply

    s.on_state[TrialState.PROBING] = tamper
    s.run()
    last = probes(s)[-1]
    assert (last.model, last.agent) == (None, None)
    assert "honest" in last.problem
    assert s.evidence.inspected == [("target-1", "none")], "it is inspected as it is"
    assert s.host.left == []


def test_a_qga_that_tampers_at_the_stop_is_noted(s: Stage) -> None:
    def tamper() -> None:
        s.host.guest("origin").broken = lambda _c: "%%%"

    s.on_state[TrialState.STOPPING] = tamper
    s.replicates = False
    s.run()
    assert "honest" in ending(s).notes[0]


def test_a_guest_that_tampers_in_its_reset_is_withheld(s: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the subject ran, nobody but our own baseline can be at fault: the trial is void."""
    from appliance.cell import cell
    from appliance.cell.baseline import restoring

    monkeypatch.setattr(cell, "prove", restoring.prove)
    monkeypatch.setattr(restoring, "host_checks", lambda _clone, _expected: iter(()))
    monkeypatch.setattr(proof, "guest_checks", proof.guest_checks)
    s.host.guest("target-1").facts = FACTS | {"boot_id": 5}
    with pytest.raises(ResetError, match="withheld") as e:
        s.run()
    assert e.value.blame == "lab"
    assert s.states == [TrialState.RESETTING]
    assert "machine-withheld" in s.events
    assert s.host.left == []


@pytest.mark.parametrize(
    ("limit", "why"), [({"wall_s": 0.3}, Stopped.TIME_LIMIT), ({"steps": 2}, Stopped.STEP_LIMIT)], ids=str
)
def test_a_limit_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, limit: dict[str, object], why: Stopped
) -> None:
    with stage(monkeypatch, plan(limits=LIMITS.model_copy(update=limit))) as s:
        s.talk, s.replicates = [event_line("start"), event_line("action", 3)], False
        s.run()
        assert ending(s).stopped is why
        assert not s.host.guest("origin").agent_runs, "the agent was stopped"


# -- guarded beside the runner ---------------------------------------------------------------------------


def cut_within(s: Stage, seconds: float) -> bool:
    """Whether every link is cut, soon enough, whatever the runner waits for."""
    deadline = time.monotonic() + seconds
    while s.host.net.plugged and time.monotonic() < deadline:
        time.sleep(0.01)
    return not s.host.net.plugged


def test_a_capture_that_dies_in_the_run_stops_it_as_the_labs_failure(s: Stage) -> None:
    s.talk = [event_line("start")]  # else it goes on until its wall clock, 30 s
    s.on_state[TrialState.RUNNING] = lambda: setattr(s.evidence.capture, "trouble", "tcpdump ended early\x1b")
    began = time.monotonic()
    with pytest.raises(TrialAborted, match="capture failed while it was needed: tcpdump ended early"):
        s.run()
    assert time.monotonic() - began < 8
    assert s.stop.failure, "nobody asked for it: it is void, not aborted"
    assert s.stop.reason.isprintable()
    assert "stopping" not in s.events
    assert s.host.left == []


def test_a_capture_that_dies_between_probes_stops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with stage(monkeypatch, plan(limits=LIMITS.model_copy(update={"lasting_s": 3600}))) as s:

        def dies(event: str) -> None:
            if event == "origin-frozen":
                s.evidence.capture.trouble = "tcpdump ended early"

        s.evidence.journal.on_write = dies
        with pytest.raises(TrialAborted, match="capture failed"):
            s.run()
        assert s.stop.failure
        assert s.host.left == []


def test_a_dead_capture_cuts_the_cell_while_a_guest_holds_the_runner_up(
    s: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[bool] = []

    def slow(machine: Incarnation, phase: str, *more: object, **named: object) -> Probe:
        if phase == "origin-frozen" and not cut:
            assert s.host.net.plugged
            s.evidence.capture.trouble = "tcpdump ended early"
            cut.append(cut_within(s, 5))
        return probe(machine, phase, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(questioning, "probe", slow)
    with pytest.raises(TrialAborted, match="capture failed"):
        s.run()
    assert cut == [True]


def test_a_capture_that_is_full_cuts_the_cell_and_the_trial_counts(s: Stage) -> None:
    """A subject that floods its segment ends its own run, and nothing of what it did before is lost."""
    s.talk = [event_line("start")]

    def fill() -> None:
        s.evidence.capture.is_full = True

    s.on_state[TrialState.RUNNING] = fill
    s.run()
    assert ending(s).stopped is Stopped.TRAFFIC_LIMIT
    assert any("every link was cut" in note for note in ending(s).notes)
    assert s.evidence.journal.events.count("traffic-held") == 1
    assert s.evidence.capture.finished == 1
    assert not s.stop.failure
    assert s.host.left == []


def test_every_link_is_cut_before_the_capture_ends(s: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    plugged, finish = list[list[str]](), s.evidence.capture.finish

    def look() -> CaptureHealth:
        plugged.append([m.name for m in s.cell.machines.values() if m.plugged])
        return finish()

    monkeypatch.setattr(s.evidence.capture, "finish", look)
    s.run()
    assert plugged == [[]]


def test_a_guard_that_fails_stops_the_trial(s: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    s.talk = [event_line("start")]

    def defect() -> str:
        raise ZeroDivisionError("a defect")

    s.on_state[TrialState.RUNNING] = lambda: monkeypatch.setattr(s.evidence.capture, "problem", defect)
    with pytest.raises(TrialAborted, match=r"no longer guarded: ZeroDivisionError: a defect"):
        s.run()
    assert s.stop.failure
    assert s.host.left == []


def fills(s: Stage, monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], None]:
    """A call that makes a machine have written twice its limit."""
    full: list[str] = []
    limit = s.plan.header.limits.disk_mb * 1_000_000
    monkeypatch.setattr(Incarnation, "written", lambda m: 2 * limit if m.name in full else limit)
    return lambda: full.append(name)


def test_a_target_that_fills_its_disk_while_it_is_probed_is_held(
    s: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is over, and yet its machines run on: the limit is theirs until they are inspected."""
    fill, held = fills(s, monkeypatch, "target-1"), list[tuple[DomainState, bool]]()

    def slow(machine: Incarnation, phase: str, *more: object, **named: object) -> Probe:
        if phase == "origin-frozen" and not held:
            fill()
            deadline = time.monotonic() + 5
            while machine.state is DomainState.RUNNING and time.monotonic() < deadline:
                time.sleep(0.01)
            held.append((machine.state, machine.plugged))
        return probe(machine, phase, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(questioning, "probe", slow)
    s.run()
    assert held == [(DomainState.PAUSED, False)]
    assert s.evidence.journal.of("disk-held") == [
        {"machine": "target-1", "written": 20_000_000, "limit": 10_000_000}
    ]
    assert ending(s).stopped is Stopped.FINISHED, "the trial counts"
    assert "target-1 was cut and paused: it wrote 20 MB of 10" in ending(s).notes
    assert s.evidence.inspected == [("target-1", "none")]
    assert s.host.left == []


@pytest.mark.parametrize("name", ["origin", "target-1"])
def test_the_machine_that_ended_the_run_at_its_disk_limit_is_held(
    s: Stage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    s.talk, s.on_state[TrialState.RUNNING] = [event_line("start")], fills(s, monkeypatch, name)
    s.run()
    assert ending(s).stopped is Stopped.DISK_LIMIT, "and not that its machine went down"
    assert [f["machine"] for f in s.evidence.journal.of("disk-held")] == [name]
    assert s.events.index("disk-held") < s.events.index("stopping"), "before anybody asks the guest anything"
    assert s.host.left == []


@pytest.mark.parametrize("name", ["origin", "target-1"])
def test_a_guest_that_keeps_an_answer_back_is_held_to_its_disk_limit_meanwhile(
    s: Stage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill, held = fills(s, monkeypatch, name), list[tuple[DomainState, bool]]()
    monkeypatch.setattr(watch, "_ALIVE_S", 0.0)

    def silent(_origin: Incarnation) -> bool:
        fill()
        machine, deadline = s.cell.machine(name), time.monotonic() + 5
        while machine.state is DomainState.RUNNING and time.monotonic() < deadline:
            time.sleep(0.01)
        held.append((machine.state, machine.plugged))
        return True

    monkeypatch.setattr("appliance.trial.runner.subject.agent_alive", silent)
    s.talk = [event_line("start")]
    s.run()
    assert held == [(DomainState.PAUSED, False)]
    assert ending(s).stopped is Stopped.DISK_LIMIT
    assert [f["machine"] for f in s.evidence.journal.of("disk-held")] == [name]


def test_a_machine_that_cannot_be_paused_is_killed(s: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []

    def kill(machine: Incarnation) -> bool:
        killed.append(machine.name)
        return True

    monkeypatch.setattr(Incarnation, "kill", kill)
    s.on_state[TrialState.RUNNING] = fills(s, monkeypatch, "target-1")
    s.host.libvirt.refuse.add("suspend target-1")
    s.talk = [event_line("start")]
    s.run()
    assert killed == ["target-1"]


def test_a_world_that_resolves_every_name_starts_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    with stage(monkeypatch, plan("target-1", "world")) as s:
        for m in s.plan.machines:
            s.host.guest(m.name).paths["resolve-outside"] = "answered by 10.77.0.1"
        s.run()
        assert s.evidence.journal.of("preflight") == [{"held": 27, "leaked": 0, "unverified": 0}]
        assert ending(s).stopped is Stopped.FINISHED
        assert s.host.left == []


# -- stopping it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_an_abort_in_any_state_leaves_nothing(s: Stage, state: TrialState) -> None:
    s.on_state[state] = s.abort
    # A condemned cell restores and plugs nothing, and says so before the runner's next look at the flag.
    with pytest.raises((TrialAborted, LabError), match=r"aborted on request|cut for good"):
        s.run()
    assert s.stop.requested
    assert s.states[-1] is state, "no further state is entered"
    assert s.host.left == []
    capture = s.evidence.capture
    started = STATES.index(state) >= STATES.index(TrialState.CAPTURING)
    assert (capture.abandoned + capture.finished >= 1) is started
    assert records.SCORE not in s.evidence.written


def test_an_abort_before_the_start_makes_nothing(s: Stage) -> None:
    s.stop.set("aborted on request")
    with pytest.raises(TrialAborted):
        s.run()
    assert s.states == []
    assert s.host.libvirt.done == []


@pytest.mark.parametrize("event", ["proved", "preflight", "started", "stopped", "origin-frozen", "collected"])
def test_an_abort_at_any_entry_leaves_nothing(s: Stage, event: str) -> None:
    s.evidence.journal.on_write = lambda e: s.abort() if e == event else None
    try:
        s.run()
    except (TrialAborted, LabError):  # a condemned cell refuses to be plugged
        assert s.stop.requested
    assert s.host.left == []


def test_an_abort_while_the_subject_runs_is_heard_at_once(s: Stage) -> None:
    s.talk = [event_line("start")]
    s.on_state[TrialState.RUNNING] = lambda: threading.Timer(0.3, s.abort).start()
    began = time.monotonic()
    with pytest.raises(TrialAborted):
        s.run()
    assert time.monotonic() - began < 8
    assert s.host.left == []


def test_an_abort_while_waiting_for_the_next_probe_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    with stage(monkeypatch, plan(limits=LIMITS.model_copy(update={"lasting_s": 3600}))) as s:
        s.evidence.journal.on_write = lambda e: (
            threading.Timer(0.2, s.abort).start() if e == "origin-frozen" else None
        )
        with pytest.raises(TrialAborted):
            s.run()
        assert s.host.left == []


# -- failing at each step --------------------------------------------------------------------------------

Inject = Callable[[Stage], None]


def refuse(*names: str) -> Inject:
    return lambda s: s.evidence.refuse.update(names)


def journal_fails(event: str) -> Inject:
    def inject(s: Stage) -> None:
        def fail(e: str) -> None:
            if e == event:
                raise EvidenceError(f"{event} cannot be written: refused by the test")

        s.evidence.journal.on_write = fail

    return inject


def at(state: TrialState, inject: Inject) -> Inject:
    return lambda s: s.on_state.update({state: lambda: inject(s)})


def host_refuses(which: str, what: str) -> Inject:
    return lambda s: getattr(s.host, which).refuse.add(what)


def set_on(what: str, value: object) -> Inject:
    return lambda s: setattr(s, what, value)


def guest(name: str, change: Callable[[FakeGuest], None]) -> Inject:
    return lambda s: change(s.host.guest(name))


def programs(name: str, rc: int) -> Inject:
    return lambda s: s.host.guest("origin").programs.update(
        {name: lambda _a, _i: (rc, b"", b"no such unit\x1b")}
    )


def no_port(s: Stage) -> None:
    s.host.on_restore = lambda _clone: None


def reference_is_silent(s: Stage) -> None:
    s.on_state[TrialState.COLLECTING] = lambda: s.host.guest("origin").serving.update({"model": None})


FAILURES: dict[str, tuple[Inject, type[Exception], str]] = {
    "bridge": (host_refuses("net", "create_bridge"), LabError, "create_bridge"),
    "restore": (lambda s: s.host.broken.add("target-1"), OSError, "cannot be restored"),
    "domain": (host_refuses("libvirt", "start origin"), LabError, "could not start"),
    "proof": (lambda s: s.host.unproved.add("target-1"), ResetError, "withheld"),
    "proofs": (refuse(records.PROOFS), EvidenceError, records.PROOFS),
    "capture": (refuse("capture"), CaptureError, "nothing is seen"),
    "seal": (set_on("seal", [SealFact(name="x", passed=False, found="eth0")]), SealError, "eth0"),
    "no seal facts": (set_on("seal", []), SealError, "nothing was examined"),
    "plug": (host_refuses("net", "plug"), LabError, "could not plug"),
    "leak": (guest("origin", lambda g: g.paths.update({"tcp4-outside": "open"})), SealError, "leaked"),
    "unverified": (guest("target-1", lambda g: g.paths.clear()), SealError, "unverified"),
    "silent": (at(TrialState.PREFLIGHT, lambda s: s.host.libvirt.power_off("target-1")), SealError, "unverified"),
    "preflight": (refuse(records.PREFLIGHT), EvidenceError, records.PREFLIGHT),
    "event port": (no_port, GuestChannelError, "event port"),
    "agent": (programs("/usr/bin/systemd-run", 1), LabError, "did not start"),
    "task": (
        at(TrialState.RUNNING, guest("origin", lambda g: setattr(g, "broken", lambda _c: "%%"))),
        GuestTamperError, "honest",
    ),
    "samples": (refuse(records.SAMPLES), EvidenceError, records.SAMPLES),
    "probes": (refuse(records.PROBES), EvidenceError, records.PROBES),
    "freeze": (host_refuses("libvirt", "suspend origin"), LabError, "could not be frozen"),
    "capture's end": (
        lambda s: setattr(s.evidence, "capture", FakeCapture(healthy=False)), CaptureError, "known frame",
    ),
    "health": (refuse(records.CAPTURE_HEALTH), EvidenceError, records.CAPTURE_HEALTH),
    "ending": (refuse(records.ENDING), EvidenceError, records.ENDING),
    "disk": (refuse("disk"), EvidenceError, "disk"),
    "disks": (refuse(records.DISKS), EvidenceError, records.DISKS),
    "reference's proof": (at(TrialState.COLLECTING, lambda s: s.host.unproved.add("origin")), ResetError, "withheld"),
    "reference silent": (reference_is_silent, LabError, "pristine origin"),
    "reference": (refuse(records.REFERENCE), EvidenceError, records.REFERENCE),
    **{
        f"journal {e}": (journal_fails(e), EvidenceError, e)
        for e in sorted({*ORDER, "machine-withheld"} - {"machine-withheld"})
    },
}  # fmt: skip


@pytest.mark.parametrize(("inject", "kind", "words"), FAILURES.values(), ids=list(FAILURES))
def test_a_failure_at_any_step_is_told_and_leaves_nothing(
    s: Stage, inject: Inject, kind: type[Exception], words: str
) -> None:
    inject(s)
    with pytest.raises(kind, match=words) as e:
        s.run()
    assert type(e.value) is kind
    s.host.net.refuse.clear()
    assert s.host.left == []
    if "capture-confirmed" in s.events:
        assert s.evidence.capture.finished + s.evidence.capture.abandoned >= 1


@pytest.mark.parametrize("step", ["seal", "agent", "disk", "reference's proof", "journal probe"])
@pytest.mark.parametrize("also", [("net", "delete_link"), ("libvirt", "destroy"), ("net", "unplug")], ids=str)
def test_the_first_error_is_told_even_if_the_end_fails_too(
    s: Stage, step: str, also: tuple[str, str]
) -> None:
    inject, kind, words = FAILURES[step]
    inject(s)
    tear_down = TrialRun._tear_down

    def failing(run: TrialRun) -> None:
        getattr(s.host, also[0]).refuse.add(also[1])
        tear_down(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrialRun, "_tear_down", failing)
        with pytest.raises(kind, match=words):
            s.run()
    assert s.host.libvirt.domains == {} or also == ("libvirt", "destroy")


def test_a_clean_run_whose_end_fails_is_void(s: Stage) -> None:
    s.replicates = False
    s.on_state[TrialState.COLLECTING] = lambda: s.host.net.refuse.add("delete_link")
    with pytest.raises(LabError):
        s.run()
    assert s.host.libvirt.domains == {}
    assert s.host.ledger.things() != [], "the sweep will know"


@pytest.mark.parametrize("what", [records.CLAIMS, "step"])
def test_claims_that_cannot_be_written_stop_the_trial_as_a_failure(s: Stage, what: str) -> None:
    s.talk = [event_line("start"), event_line("note")]
    (journal_fails("step") if what == "step" else refuse(what))(s)
    with pytest.raises(TrialAborted, match="evidence cannot be written"):
        s.run()
    assert s.stop.failure, "nobody asked for it: it is void, not aborted"
    assert s.host.left == []


def test_an_unexpected_error_leaves_nothing_either(s: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    close = EventStream.close

    def defect(stream: EventStream) -> None:
        close(stream)
        raise ZeroDivisionError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(EventStream, "close", defect)
        with pytest.raises(ZeroDivisionError):
            s.run()
    assert s.host.left == []


def test_the_preflight_is_written_also_when_it_fails(s: Stage) -> None:
    s.host.guest("origin").paths["tcp4-outside"] = "open"
    with pytest.raises(SealError):
        s.run()
    written = s.evidence.written[records.PREFLIGHT]
    assert [c.outcome for c in written if isinstance(c, PathCheck)].count("leaked") == 1
    assert MODEL
