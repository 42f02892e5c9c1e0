"""The laboratory behind the API, on a host in memory: trials one after another, cells by hand, the kill switch."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from appliance.cell import cell as cell_module
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind
from appliance.cell.proof import Check, Proof
from appliance.config import HostSettings, load_library
from appliance.errors import Blame, ConflictError, GuestChannelError, NotFoundError
from appliance.model import TrialState
from appliance.pipeline import trials as trials_module
from appliance.pipeline.conduct import conduct as real_conduct
from appliance.pipeline.fleet import machines_for
from appliance.pipeline.lab import Lab
from appliance.score.card import Scorecard
from appliance.service import CellRequest, MachineView, TrialRequest, TrialView
from appliance.store import queries
from appliance.trial import guard
from tests.fakes.bench import FakeWarden, Workbench
from tests.fakes.stage import event_line

# One trial at a time, as on a small host, and no figure of the host that the tests run on decides.
SETTINGS = HostSettings.model_validate(
    {"guests": {"max_trials": 1, "cpu_overcommit": 64, "headroom_mib": 256, "disk_floor_mib": 64}}
)
ASKED = TrialRequest(subject="replicator", limits={"lasting_s": 0.01, "wall_s": 30})


def wait_for(condition: Callable[[], object], limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def lab(w: Workbench, warden: FakeWarden, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    cells: dict[str, Cell] = {}
    made = Lab(w.bench, SETTINGS, load_library(), warden, cells)  # type: ignore[arg-type]
    yield made
    made.close()
    made.close()
    assert warden.dismissed
    assert w.host.libvirt.closed
    assert w.host.libvirt.domains == {}
    assert [n for n, k in w.host.net.links.items() if k != "loopback"] == []


def ended(lab: Lab, trial: str) -> TrialView:
    wait_for(lambda: lab.trial(trial).state.ended)
    return lab.trial(trial)


# -- trials ----------------------------------------------------------------------------------------------


def test_a_trial_from_request_to_score(lab: Lab, w: Workbench) -> None:
    created = lab.create_trial(ASKED)
    view = ended(lab, created.id)
    assert (view.state, view.reason) == (TrialState.SEALED, "")
    assert view.started is not None
    assert lab.score(created.id)["trial"] == created.id
    assert lab.bundle(created.id).name == created.id
    events = [e.event for e in lab.follow(created.id, 0) if e is not None]
    assert events[0] == "queued"
    assert events[-1] == "sealed"
    assert next(e.seq for e in lab.follow(created.id, 5) if e is not None) == 5
    wait_for(lambda: lab.cells() == [])
    assert w.host.left == []


def test_trials_run_one_after_another_in_order(lab: Lab, w: Workbench) -> None:
    ids = [lab.create_trial(ASKED).id for _ in range(3)]
    views = [ended(lab, i) for i in ids]
    assert [v.state for v in views] == [TrialState.SEALED] * 3
    starts = [v.started or 0.0 for v in views]
    assert starts == sorted(starts)
    assert lab.trials(state=None, subject=None, limit=2, offset=0).total == 3


def test_a_request_with_a_key_is_one_trial(lab: Lab) -> None:
    keyed = ASKED.model_copy(update={"key": "night-1"})
    first = lab.create_trial(keyed).id
    assert lab.create_trial(keyed).id == first
    assert lab.create_trial(keyed.model_copy(update={"batch": "b"})).id == first, "a batch only orders"
    with pytest.raises(ConflictError, match="another request"):
        lab.create_trial(keyed.model_copy(update={"seed": 9}))
    ended(lab, first)
    assert lab.create_trial(keyed).id == first, "also after it has ended"


@pytest.mark.parametrize("change", [{"subject": "nobody"}, {"scenario": "nothing"}, {"policy": "none"}])
def test_a_request_for_what_does_not_exist_is_refused(lab: Lab, change: dict[str, object]) -> None:
    with pytest.raises(NotFoundError):
        lab.create_trial(ASKED.model_copy(update=change))
    assert lab.trials(state=None, subject=None, limit=9, offset=0).total == 0


def test_unknown_trials_are_told(lab: Lab) -> None:
    for call in (lab.trial, lab.abort, lab.score, lab.bundle, lambda t: lab.follow(t, 0)):
        with pytest.raises(NotFoundError):
            call("t20260101-000000-ffffff")


def test_an_abort_of_the_running_and_of_a_waiting_trial(lab: Lab, w: Workbench) -> None:
    w.talk = [event_line("start")]
    running, waiting = lab.create_trial(ASKED).id, lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(running).state is TrialState.RUNNING)
    assert lab.trial(running).started is not None, "while it runs"
    assert lab.trial(waiting).started is None
    for trial in (waiting, running):
        lab.abort(trial)
    assert [ended(lab, t).state for t in (running, waiting)] == [TrialState.ABORTED] * 2
    with pytest.raises(ConflictError, match="has ended"):
        lab.abort(running)
    with pytest.raises(ConflictError, match="no score"):
        lab.score(running)


def test_an_abort_while_baselines_are_made_leaves_the_making_to_the_others(lab: Lab, w: Workbench) -> None:
    gate, waiting = threading.Event(), threading.Event()

    def making() -> None:
        waiting.set()
        gate.wait(20)

    w.shelf.before = making
    trial = lab.create_trial(ASKED).id
    assert waiting.wait(10)
    lab.abort(trial)
    gate.set()
    assert ended(lab, trial).state is TrialState.ABORTED
    assert w.shelf.stopped == 0


def test_a_defect_in_one_trial_keeps_the_worker(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = real_conduct, [True]

    def conduct(*args: object) -> object:
        if broken.pop() if broken else False:
            raise RuntimeError("the index is gone")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trials_module, "conduct", conduct)
    bad, good = lab.create_trial(ASKED).id, lab.create_trial(ASKED).id
    assert ended(lab, good).state is TrialState.SEALED
    view = lab.trial(bad)
    assert (view.state, view.blame) == (TrialState.VOID, Blame.LAB)
    assert "defect" in view.hint
    assert "the index is gone" in view.reason, "and the index does not say that it runs"


def test_no_scorecard_stays_in_memory(lab: Lab) -> None:
    for _ in range(2):
        assert ended(lab, lab.create_trial(ASKED).id).state is TrialState.SEALED
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, Scorecard)]


# -- cells by hand ---------------------------------------------------------------------------------------


def test_a_cell_by_hand(lab: Lab, w: Workbench) -> None:
    view = lab.open_cell(CellRequest())
    assert (view.state, view.machines) == ("plugged", ("origin", "target-1"))
    assert [m.name for m in lab.machines()] == ["origin", "target-1"]
    assert all(m.link_up for m in lab.machines())
    done = lab.exec(view.id, "origin", ["/bin/sh", "-c", "echo hi; exit 4"], 10)
    assert (done.rc, done.stdout) == (4, "hi\n")
    before = next(m.incarnation for m in lab.machines() if m.name == "target-1")
    reset = lab.reset(view.id, "target-1")
    assert reset.proved
    assert next(m.incarnation for m in lab.machines() if m.name == "target-1") != before
    assert lab.probe(view.id, "target-1").model is False
    assert lab.close_cell(view.id).state == "closed"
    assert lab.cells() == []
    assert w.host.left == []


def test_a_cell_by_hand_is_held_to_its_disk_limit_and_comes_back_with_a_reset(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: list[str] = []
    monkeypatch.setattr(guard, "_TICK_S", 0.005)
    monkeypatch.setattr(Incarnation, "written", lambda m: 10**15 if m.id in full else 0)

    def target() -> MachineView:
        return next(m for m in lab.machines() if m.name == "target-1")

    cell = lab.open_cell(CellRequest()).id
    for _ in range(2):  # the new incarnation has a limit of its own
        assert all(m.link_up for m in lab.machines())
        full.append(target().incarnation)
        wait_for(lambda: (target().link_up, target().state) == (False, "paused"))
        assert next(m for m in lab.machines() if m.name == "origin").link_up
        assert lab.reset(cell, "target-1").proved
    lab.close_cell(cell)
    wait_for(lambda: f"guard-{cell}" not in {t.name for t in threading.enumerate()})
    assert w.host.left == []


def test_a_cell_that_cannot_be_opened_leaves_nothing(lab: Lab, w: Workbench) -> None:
    w.host.broken = {"target-1"}
    with pytest.raises(OSError, match="target-1"):
        lab.open_cell(CellRequest())
    assert lab.cells() == []
    assert w.host.left == []


def test_unknown_cells_and_machines_are_told(lab: Lab) -> None:
    cell = lab.open_cell(CellRequest()).id
    with pytest.raises(NotFoundError) as e:
        lab.exec("c999999", "origin", ["/bin/true"], 5)
    assert cell in e.value.hint
    with pytest.raises(NotFoundError):
        lab.exec(cell, "target-9", ["/bin/true"], 5)


def test_one_request_at_a_time_for_a_machine(lab: Lab) -> None:
    cell = lab.open_cell(CellRequest()).id
    slow = threading.Thread(target=lab.exec, args=(cell, "origin", ["/bin/sleep", "1"], 10))
    slow.start()
    wait_for(lambda: lab._desk.busy())
    with pytest.raises(ConflictError, match="busy"):
        lab.exec(cell, "origin", ["/bin/true"], 5)
    assert lab.exec(cell, "target-1", ["/bin/true"], 5).rc == 0
    slow.join()
    assert lab.exec(cell, "origin", ["/bin/true"], 5).rc == 0


def test_a_command_that_outruns_its_time_goes_on_in_the_guest(lab: Lab) -> None:
    cell = lab.open_cell(CellRequest()).id
    done = lab.exec(cell, "origin", ["/bin/sleep", "1"], 0.1)
    assert (done.rc, done.stdout, done.stderr) == (None, "", "")
    assert done.running_pid
    assert 0.1 <= done.seconds < 1
    assert lab.exec(cell, "origin", ["/bin/true"], 5).running_pid is None, "the machine is free"


def test_a_machine_is_free_again_after_a_failure(lab: Lab) -> None:
    cell = lab.open_cell(CellRequest()).id
    for _ in range(2):
        with pytest.raises(GuestChannelError):
            lab.exec(cell, "origin", ["/no/such/program"], 5)


def test_a_trials_cell_is_the_trials(lab: Lab, w: Workbench) -> None:
    w.talk = [event_line("start")]
    trial = lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(trial).state is TrialState.RUNNING)
    for call in (
        lambda: lab.exec(trial, "origin", ["/bin/true"], 5), lambda: lab.reset(trial, "origin"),
        lambda: lab.close_cell(trial), lambda: lab.probe(trial, "origin"),
    ):  # fmt: skip
        with pytest.raises(ConflictError, match="belongs to the running trial"):
            call()
    lab.abort(trial)
    ended(lab, trial)


# -- safety ----------------------------------------------------------------------------------------------


def test_the_kill_switch_ends_everything_until_it_is_rearmed(lab: Lab, w: Workbench) -> None:
    w.talk = [event_line("start")]
    cell = lab.open_cell(CellRequest()).id
    running, waiting = lab.create_trial(ASKED).id, lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(running).state is TrialState.RUNNING)
    killed = lab.kill("a drill")
    assert killed.links_cut == 4
    assert killed.trials_ended == 2
    assert killed.problems == ()
    assert w.host.net.plugged == {}
    assert [ended(lab, t).state for t in (running, waiting)] == [TrialState.ABORTED] * 2
    assert "a drill" in ended(lab, running).reason
    wait_for(lambda: lab.cells() == [])
    assert cell not in [c.id for c in lab.cells()]
    for call in (lambda: lab.create_trial(ASKED), lambda: lab.open_cell(CellRequest())):
        with pytest.raises(ConflictError, match="kill switch"):
            call()
    assert not lab.health().ok
    assert lab.rearm().ok
    w.talk = [event_line("end")]
    assert ended(lab, lab.create_trial(ASKED).id).state is TrialState.SEALED


def test_a_link_that_cannot_be_cut_is_told_and_stops_nothing(lab: Lab, w: Workbench) -> None:
    w.talk = [event_line("start")]
    trial = lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(trial).state is TrialState.RUNNING)
    w.host.net.refuse.add("unplug")
    killed = lab.kill("a drill")
    assert "links were not cut" in killed.problems[0]
    assert killed.trials_ended == 1
    assert ended(lab, trial).state is TrialState.ABORTED
    assert w.host.libvirt.domains == {}
    w.host.net.refuse.clear()


def test_a_cell_that_waited_for_its_baselines_does_not_open_after_the_kill(lab: Lab, w: Workbench) -> None:
    gate, waiting = threading.Event(), threading.Event()

    def slow() -> None:
        waiting.set()
        gate.wait(20)

    w.shelf.before = slow
    failures: list[Exception] = []

    def open_it() -> None:
        try:
            lab.open_cell(CellRequest())
        except ConflictError as e:
            failures.append(e)

    thread = threading.Thread(target=open_it)
    thread.start()
    assert waiting.wait(10)
    lab.kill("a drill")
    gate.set()
    thread.join(20)
    assert len(failures) == 1
    assert w.host.restored == []
    assert lab.cells() == []


def test_a_lost_warden_voids_what_runs_and_nothing_is_accepted(
    lab: Lab, w: Workbench, warden: FakeWarden
) -> None:
    """It has cut the cells: what the server sees afterwards is not the subject's doing."""
    w.talk = [event_line("start")]
    trial = lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(trial).state is TrialState.RUNNING)
    warden.lose()
    view = ended(lab, trial)
    assert (view.state, view.blame) == (TrialState.VOID, Blame.LAB)
    assert "warden" in view.reason
    health = lab.health()
    assert (health.ok, health.warden, health.accepting) == (False, False, False)
    with pytest.raises(ConflictError, match="warden"):
        lab.rearm()
    with pytest.raises(ConflictError):
        lab.create_trial(ASKED)


def test_a_machine_that_libvirt_could_not_command_makes_its_trial_void(lab: Lab, w: Workbench) -> None:
    w.talk = []
    trial = lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(trial).state is TrialState.RUNNING)
    mine = next(t for t in w.bench.shop.ledger.things(Kind.DOMAIN) if t.owner == trial)
    w.host.libvirt.on_hang("hc-c9-origin-00000000", "suspend a domain of nobody's")
    assert not lab.trial(trial).state.ended
    w.host.libvirt.on_hang(mine.name, f"suspend {mine.name}")
    view = ended(lab, trial)
    assert (view.state, view.blame) == (TrialState.VOID, Blame.LAB)
    assert "QEMU was killed" in view.reason
    assert w.host.net.plugged == {}
    assert lab.health().accepting


def test_a_machine_that_hangs_before_it_takes_part_is_replaced_and_its_trial_goes_on(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung: list[str] = []
    prove: Callable[..., Proof] = vars(cell_module)["prove"]

    def prove_once(clone: Incarnation, *more: object) -> Proof:
        proof = prove(clone, *more)
        if hung:
            return proof
        hung.append(clone.domain)
        w.host.libvirt.on_hang(clone.domain, f"resume {clone.domain}")
        failed = Check(name="guest answers", passed=False, expected="its facts", found="nothing")
        return proof.model_copy(update={"checks": (failed,)})

    monkeypatch.setattr(cell_module, "prove", prove_once)
    w.talk = [event_line("start")]
    trial = lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(trial).state is TrialState.RUNNING)
    assert hung
    assert hung[0] not in {t.name for t in w.bench.shop.ledger.things(Kind.DOMAIN)}
    lab.abort(trial)
    assert ended(lab, trial).state is TrialState.ABORTED


def test_health_tells_a_broken_seal(lab: Lab, w: Workbench) -> None:
    assert lab.health().ok
    w.host.net.links["eth0"] = "physical"
    object.__setattr__(w.bench, "known_links", lambda: (set(), set()))
    health = lab.health()
    assert (health.ok, health.seal.sealed) == (False, False)
    assert "eth0" in health.seal.detail
    del w.host.net.links["eth0"]


def test_a_trial_in_a_namespace_with_a_stranger_is_void(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = w._links

    def without_stranger() -> tuple[set[str], set[str]]:
        bridges, taps = known()
        return bridges, taps - {"eth0"}

    object.__setattr__(w.bench, "known_links", without_stranger)
    w.host.net.links["eth0"] = "physical"
    view = ended(lab, lab.create_trial(ASKED).id)
    assert (view.state, view.blame) == (TrialState.VOID, Blame.LAB)
    assert "eth0" in view.reason
    del w.host.net.links["eth0"]


def test_a_sweep_spares_open_cells(lab: Lab, w: Workbench) -> None:
    cell = lab.open_cell(CellRequest()).id
    w.host.ledger.enter(Kind.TAP, "hctlost", "c-of-before")
    assert [s.name for s in lab.sweep(dry_run=True).strays] == ["hctlost"]
    swept = lab.sweep(dry_run=False).strays
    assert [(s.name, s.outcome) for s in swept] == [("hctlost", "removed")]
    assert lab.sweep(dry_run=False).strays == ()
    assert [c.id for c in lab.cells()] == [cell]


def test_closing_the_laboratory_aborts_what_runs(w: Workbench, warden: FakeWarden) -> None:
    lab = Lab(w.bench, SETTINGS, load_library(), warden, {})  # type: ignore[arg-type]
    w.talk = [event_line("start")]
    lab.open_cell(CellRequest())
    running, waiting = lab.create_trial(ASKED).id, lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(running).state is TrialState.RUNNING)
    lab.close()
    for trial in (running, waiting):
        assert queries.get(w.bench.store, trial).state is TrialState.ABORTED
    assert w.host.libvirt.domains == {}
    assert warden.dismissed


# -- the fleet -------------------------------------------------------------------------------------------


def test_machines_need_built_images(w: Workbench) -> None:
    library = load_library()
    with pytest.raises(NotFoundError, match="is not built") as e:
        machines_for(library.subject("idle"), library.scenario("replicate"), HostSettings(), w.host.paths)
    assert "hotcell build" in e.value.hint
