"""Several trials and cells at once in one laboratory: whose machine is whose, and one switch for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from appliance.cell.cell import Cell
from appliance.cell.ledger import Kind
from appliance.config import HostSettings, load_library
from appliance.errors import CapacityError, ConflictError, HotcellError
from appliance.evidence import journal
from appliance.host.capacity import HostCapacity
from appliance.model import TrialState
from appliance.pipeline import grants as grants_module
from appliance.pipeline import lab as lab_module
from appliance.pipeline.lab import Lab
from appliance.pipeline.opening import links_of
from appliance.pipeline.process import seal_facts
from appliance.service import CellRequest, TrialRequest
from appliance.trial.records import JournalEntry
from tests.fakes.bench import FakeWarden, Workbench, workbench
from tests.fakes.client import client
from tests.fakes.stage import event_line

SETTINGS = HostSettings.model_validate({"guests": {"cpu_overcommit": 64, "headroom_mib": 256}})
ASKED = TrialRequest(subject="replicator", limits={"lasting_s": 0.01, "wall_s": 60, "disk_mb": 100})
MIB = 1 << 20
SET_MIB = 2 * (512 + 128)


def wait_for(condition: Callable[[], object], limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class House:
    """How much memory there is, in MiB; machines in memory take none of it."""

    def __init__(self) -> None:
        self.memory = 3 * SET_MIB + 256

    def capacity(self, _path: object) -> HostCapacity:
        return HostCapacity(
            cores=2, memory_total=64 << 30, memory_available=self.memory * MIB, disk_total=1 << 40,
            disk_free=1 << 39,
        )  # fmt: skip


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
def w(monkeypatch: pytest.MonkeyPatch, house: House, two_machines: None) -> Iterator[Workbench]:
    monkeypatch.setattr(lab_module, "host_capacity", house.capacity)
    monkeypatch.setattr(grants_module, "held_memory", lambda _pid: 0)
    with workbench(monkeypatch) as made:
        made.talk = [event_line("start")]  # the subjects do not end by themselves
        yield made


@pytest.fixture
def lab(w: Workbench, warden: FakeWarden) -> Iterator[Lab]:
    cells: dict[str, Cell] = {}
    made = Lab(w.bench, SETTINGS, load_library(), warden, cells)  # type: ignore[arg-type]
    yield made
    made.close()
    assert w.host.libvirt.domains == {}
    assert [n for n, k in w.host.net.links.items() if k != "loopback"] == []


def start(lab: Lab, count: int) -> list[str]:
    """Trials whose subjects run, one begun after the other: machines in memory of one name share a guest."""
    ids = []
    for _ in range(count):
        ids.append(lab.create_trial(ASKED).id)
        wait_for(lambda: lab.trial(ids[-1]).state is TrialState.RUNNING)
    return ids


def test_three_run_the_fourth_waits_and_tells_why(lab: Lab, w: Workbench) -> None:
    ids = start(lab, 3)
    fourth = lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(fourth).waiting)
    view = lab.trial(fourth)
    assert (view.state, view.position) == (TrialState.QUEUED, 1)
    assert view.waiting == "needs 1.2 GiB of memory, 0.0 GiB free after promises"
    health = lab.health()
    assert (health.ok, health.trials_running, health.queue, health.waiting) == (True, 3, 1, view.waiting)
    assert lab.trial(ids[0]).position is None
    assert [e.event for e in _entries(lab, fourth)][:2] == ["queued", "waiting"]
    lab.abort(ids[0])
    wait_for(lambda: lab.trial(fourth).state is TrialState.RUNNING)
    assert (lab.trial(fourth).position, lab.trial(fourth).waiting) == (None, "")


def _entries(lab: Lab, trial: str) -> list[JournalEntry]:
    return list(journal.scan(lab._bench.paths.open_trials / trial / "journal.jsonl"))


def test_every_running_trial_has_its_own_cell_with_the_same_addresses(lab: Lab, w: Workbench) -> None:
    ids = start(lab, 3)
    by_cell = {c.id: c for c in lab.cells()}
    assert {c.trial for c in by_cell.values()} == set(ids) == set(by_cell)
    machines = [m for m in lab.machines() if m.name == "origin"]
    assert len({m.incarnation for m in machines}) == 3
    assert len({m.address for m in machines}) == 1
    assert len({lab._cells[i].bridge for i in ids}) == 3
    for trial in ids:
        with pytest.raises(ConflictError, match=trial):
            lab.reset(trial, "origin")


def test_aborting_one_leaves_the_others(lab: Lab, w: Workbench) -> None:
    first, second, third = start(lab, 3)
    lab.abort(second)
    wait_for(lambda: lab.trial(second).state is TrialState.ABORTED)
    wait_for(lambda: {c.id for c in lab.cells()} == {first, third})
    assert all(m.link_up for m in lab.machines())
    assert {lab.trial(t).state for t in (first, third)} == {TrialState.RUNNING}


def test_a_waiting_trial_that_is_aborted_has_ended_when_the_call_returns(lab: Lab) -> None:
    start(lab, 3)
    waiting = lab.create_trial(ASKED).id
    view = lab.abort(waiting)
    assert (view.state, view.position) == (TrialState.ABORTED, None)
    assert lab.bundle(waiting).exists(), "also what never ran is evidence"
    assert lab.health().queue == 0
    with pytest.raises(ConflictError, match="has ended"):
        lab.abort(waiting)


def test_the_kill_switch_ends_all_of_them(lab: Lab, w: Workbench) -> None:
    ids = start(lab, 2)
    hand = lab.open_cell(CellRequest()).id
    waiting = [lab.create_trial(ASKED).id for _ in range(3)]
    killed = lab.kill("a drill")
    assert (killed.links_cut, killed.trials_ended, killed.problems) == (6, 5, ())
    assert w.host.net.plugged == {}
    for trial in ids + waiting:
        wait_for(lambda t=trial: lab.trial(t).state is TrialState.ABORTED)  # type: ignore[misc]
    wait_for(lambda: lab.cells() == [])
    assert hand not in {c.id for c in lab.cells()}
    lab.rearm()
    assert lab.open_cell(CellRequest()).state == "plugged", "all the room is free again"


def test_a_lost_warden_voids_all_of_them(lab: Lab, w: Workbench, warden: FakeWarden) -> None:
    ids = start(lab, 2)
    waiting = [lab.create_trial(ASKED).id for _ in range(3)]
    warden.lose()
    for trial in ids + waiting:
        wait_for(lambda t=trial: lab.trial(t).state.ended)  # type: ignore[misc]
        assert lab.trial(trial).state is TrialState.VOID
        assert "warden" in lab.trial(trial).reason


def test_closing_ends_all_of_them(w: Workbench, warden: FakeWarden) -> None:
    lab = Lab(w.bench, SETTINGS, load_library(), warden, {})  # type: ignore[arg-type]
    start(lab, 3)
    lab.create_trial(ASKED)
    lab.close()
    assert {t.name for t in threading.enumerate() if t.name.startswith("trial")} == set()
    assert w.host.libvirt.domains == {}


def test_a_cell_by_hand_is_admitted_by_the_same_rule(lab: Lab, house: House) -> None:
    house.memory = SET_MIB + 256 + 100
    first = lab.open_cell(CellRequest())
    with pytest.raises(CapacityError, match="free after promises") as e:
        lab.open_cell(CellRequest())
    assert e.value.fields["needed_mib"] == SET_MIB
    lab.close_cell(first.id)
    assert lab.open_cell(CellRequest()).state == "plugged"


def test_who_opens_a_cell_by_hand_takes_no_room_from_a_trial_that_waits(lab: Lab, house: House) -> None:
    house.memory = SET_MIB + 256 + 100
    hand = lab.open_cell(CellRequest()).id
    waiting = lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(waiting).waiting)
    assert lab.trial(waiting).waiting.endswith(f"(cells opened by hand hold room too: {hand})")
    house.memory = 2 * SET_MIB + 256 - 1
    with pytest.raises(ConflictError, match="1 trials wait for room"):
        lab.open_cell(CellRequest())
    lab.close_cell(hand)
    wait_for(lambda: lab.trial(waiting).state is TrialState.RUNNING)


def test_what_would_never_fit_is_refused_at_once(lab: Lab, house: House) -> None:
    house.memory = SET_MIB + 255
    with pytest.raises(CapacityError, match="GiB") as e:
        lab.create_trial(ASKED)
    assert e.value.fields["available_mib"] == SET_MIB + 255
    assert lab.trials(state=None, subject=None, limit=9, offset=0).total == 0


def test_two_who_open_at_once_do_not_get_the_same_room(lab: Lab, w: Workbench, house: House) -> None:
    """Room is taken before baselines are looked for, which can take minutes."""
    house.memory = SET_MIB + 256 + 100
    go, results = threading.Barrier(2), list[str]()
    w.shelf.before = lambda: time.sleep(0.2)

    def open_one() -> None:
        go.wait()
        try:
            results.append(lab.open_cell(CellRequest()).state)
        except CapacityError:
            results.append("refused")

    threads = [threading.Thread(target=open_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == ["plugged", "refused"]


def test_the_room_of_a_trial_is_free_once_it_is_seen_to_have_ended(lab: Lab, house: House) -> None:
    house.memory = SET_MIB + 256
    for _ in range(5):
        trial = start(lab, 1)[0]
        lab.abort(trial)
        wait_for(lambda t=trial: lab.trial(t).state.ended)  # type: ignore[misc]
        lab.close_cell(lab.open_cell(CellRequest()).id)


# -- one machine, several clients ------------------------------------------------------------------------


def test_of_many_clients_that_reset_one_machine_at_once_one_wins(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = lab.open_cell(CellRequest()).id
    before = {m.name: m.incarnation for m in lab.machines()}
    real, resetting, go = Cell.reset, threading.Event(), threading.Event()

    def slow(self: Cell, *args: object) -> object:
        resetting.set()
        assert go.wait(20)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Cell, "reset", slow)
    http, answers = client(lab), list[tuple[int, str]]()

    def reset() -> None:
        answer = http.post(f"/v1/cells/{cell}/machines/target-1/reset")
        answers.append((answer.status_code, answer.text))

    winner = threading.Thread(target=reset)
    winner.start()
    assert resetting.wait(20)
    losers = [threading.Thread(target=reset) for _ in range(5)]
    for thread in losers:
        thread.start()
    for thread in losers:
        thread.join(20)
    assert [code for code, _ in answers] == [409] * 5
    assert "busy with another request" in answers[0][1]
    # Nor may the cell be closed or reset as a whole meanwhile: its new machine would have no cell.
    assert http.delete(f"/v1/cells/{cell}").status_code == 409
    with pytest.raises(ConflictError, match="target-1 of"):
        lab.reset_cell(cell)
    assert lab.exec(cell, "origin", ["/bin/true"], 5).rc == 0, "the other machine is free"
    go.set()
    winner.join(20)
    assert answers[-1][0] == 200
    after = {m.name: m.incarnation for m in lab.machines()}
    assert after["target-1"] != before["target-1"]
    assert after["origin"] == before["origin"]
    assert http.delete(f"/v1/cells/{cell}").status_code == 200


def test_a_kill_during_a_reset_leaves_no_machine(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = lab.open_cell(CellRequest()).id
    restoring, go, failures = threading.Event(), threading.Event(), list[HotcellError]()
    before = w.host.on_restore

    def slow(clone: object) -> None:
        restoring.set()
        assert go.wait(20)
        before(clone)  # type: ignore[arg-type]

    monkeypatch.setattr(w.host, "on_restore", slow)

    def reset() -> None:
        try:
            lab.reset(cell, "target-1")
        except HotcellError as e:
            failures.append(e)

    thread = threading.Thread(target=reset)
    thread.start()
    assert restoring.wait(20)
    threading.Timer(0.2, go.set).start()
    killed = lab.kill("a drill")
    thread.join(20)
    assert killed.problems == ()
    assert "cut for good" in str(failures[0])
    assert lab.cells() == []
    assert w.host.libvirt.domains == {}
    assert w.host.left == []


# -- the seal with several cells -------------------------------------------------------------------------


def test_the_seal_knows_the_links_of_all_cells_and_of_nobody_else(lab: Lab, w: Workbench) -> None:
    trial = start(lab, 1)[0]
    hand = lab.open_cell(CellRequest()).id
    ledger = w.host.ledger

    def broken(owners: set[str]) -> list[str]:
        return [f.found for f in seal_facts(lambda: links_of(ledger, owners)) if not f.passed]

    assert broken({trial, hand}) == []
    assert all(m.spec.tap in broken({trial})[0] for m in lab._cells[hand].machines.values())
    assert all(m.spec.tap in broken({hand})[0] for m in lab._cells[trial].machines.values())
    ledger.enter(Kind.TAP, "hctlost", "c-of-before")
    w.host.net.links["hctlost"] = "tun"
    assert broken({trial, hand}) == ["['hctlost (tun)']"]
    del w.host.net.links["hctlost"]
    ledger.strike(Kind.TAP, "hctlost")
