"""What stops everything holds when parts of it fail, and what is lost in a cell can come back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from appliance.cell import netlink
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind
from appliance.config import load_library
from appliance.errors import ConflictError, HotcellError, LabError, NotFoundError, ResetError
from appliance.model import TrialState
from appliance.pipeline import cells as cells_module
from appliance.pipeline import switches as switches_module
from appliance.pipeline.lab import Lab
from appliance.service import CellRequest, ResetView
from appliance.trial.baselines import BaselineShelf
from tests.fakes.bench import FakeWarden, Workbench
from tests.fakes.machine import machine_spec
from tests.fakes.saved import publish_one
from tests.fakes.stage import event_line
from tests.unit.test_pipeline_lab import ASKED, SETTINGS, ended, wait_for
from tests.unit.test_trial_baselines import KEYS


@pytest.fixture
def lab(w: Workbench, warden: FakeWarden) -> Iterator[Lab]:
    made = Lab(w.bench, SETTINGS, load_library(), warden, {})  # type: ignore[arg-type]
    yield made
    w.host.libvirt.refuse = set()
    made.close()
    assert w.host.libvirt.domains == {}


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Domains that the kill switch sent a SIGKILL to."""
    sent: list[str] = []

    def kill(pid: int | None, domain: str) -> bool:
        sent.append(domain)
        return pid is not None

    monkeypatch.setattr(switches_module, "kill_domain_process", kill)
    return sent


class Held:
    """Restoring waits until it is let go."""

    def __init__(self, w: Workbench) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        before = w.host.on_restore

        def slow(clone: Incarnation) -> None:
            self.begun.set()
            assert self.go.wait(20)
            before(clone)

        w.host.on_restore = slow


def origins(lab: Lab) -> dict[str, str]:
    return {m.cell: m.incarnation for m in lab.machines() if m.name == "origin"}


# -- the kill switch -------------------------------------------------------------------------------------


def test_no_error_at_one_link_keeps_the_others_plugged(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    w.talk = [event_line("start")]
    first, second = lab.open_cell(CellRequest()).id, lab.open_cell(CellRequest()).id
    trial = lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(trial).state is TrialState.RUNNING)
    bad, real = lab._cells[first].machine("origin").spec.tap, netlink.unplug

    def unplug(tap: str) -> None:
        if tap == bad:
            raise OSError(24, "Too many open files")
        real(tap)

    monkeypatch.setattr(netlink, "unplug", unplug)
    view = lab.kill("a drill")
    assert view.links_cut == 5
    assert "Too many open files" in view.problems[0]
    assert set(w.host.net.plugged) <= {bad}
    assert ended(lab, trial).state is TrialState.ABORTED
    assert second not in {c.id for c in lab.cells()}


def test_an_error_that_nobody_foresaw_keeps_no_trial_running(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    w.talk = [event_line("start")]
    trial = lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(trial).state is TrialState.RUNNING)
    for name in ("stop_making", "cells_in_use"):
        monkeypatch.setattr(w.shelf, name, lambda *_: 1 / 0)
    view = lab.kill("a drill")
    assert view.problems == ("ZeroDivisionError: division by zero",)
    assert w.host.net.plugged == {}
    assert ended(lab, trial).state is TrialState.ABORTED
    monkeypatch.undo()


def test_an_error_at_one_trial_keeps_the_others_from_running_on(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    w.talk = [event_line("start")]
    running, waiting = lab.create_trial(ASKED).id, lab.create_trial(ASKED).id
    wait_for(lambda: lab.trial(running).state is TrialState.RUNNING)
    real, bad = lab._trials._dispatcher.stop, [OSError(24, "Too many open files")]

    def stop(*args: Any, **how: Any) -> None:
        if bad:
            raise bad.pop()
        real(*args, **how)

    monkeypatch.setattr(lab._trials._dispatcher, "stop", stop)
    lab.kill("a drill")
    assert ended(lab, waiting).state is TrialState.ABORTED
    assert w.host.net.plugged == {}, "the cell of the other was cut all the same"
    lab.abort(running)
    assert ended(lab, running).state is TrialState.ABORTED


def test_a_lost_warden_throws_the_switch_whatever_the_trials_do(
    lab: Lab, w: Workbench, warden: FakeWarden, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.open_cell(CellRequest())
    with monkeypatch.context() as patch:
        patch.setattr(lab._trials, "abort_all", lambda *_, **_k: 1 / 0)
        with suppress(ZeroDivisionError):
            warden.lose()
    assert w.host.net.plugged == {}


def test_every_machine_of_the_ledger_is_killed(lab: Lab, w: Workbench, killed: list[str]) -> None:
    """A template, whose cell is nobody's, and a standby in the making have nothing else to be found by."""
    w.no_room = ""
    held = Held(w)
    w.bench.standbys.keep("c1", [publish_one(w.host, "mine")])
    assert held.begun.wait(10)
    w.host.ledger.enter(Kind.DOMAIN, "hc-make-1-origin-0", "make-1")
    view = lab.kill("a drill")
    assert "hc-make-1-origin-0" in killed
    assert [n for n in killed if n.startswith("hc-standby-target-1")]
    assert view.machines_stopped == 1, "the template of this test has no process"
    held.go.set()
    wait_for(lambda: not w.host.libvirt.domains)
    assert w.bench.standbys.ready() == {}
    w.host.ledger.strike(Kind.DOMAIN, "hc-make-1-origin-0")


def test_descriptors_are_kept_for_the_switch(lab: Lab) -> None:
    spare = list(lab._switches._spare)
    assert len(spare) >= 16
    lab.kill("a drill")
    assert lab._switches._spare == []
    lab.rearm()
    assert len(lab._switches._spare) == len(spare)


def test_a_template_that_was_killed_before_it_had_a_process_is_never_plugged(
    w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, real = BaselineShelf(w.host.shop, KEYS), w.host.libvirt.start

    def start(xml: str, *, paused: bool) -> None:
        shelf.stop_making()
        real(xml, paused=paused)

    monkeypatch.setattr(w.host.libvirt, "start", start)
    with pytest.raises(LabError, match="the making was ended"):
        shelf.ensure([machine_spec("target-1")], lambda *_: None)
    assert not [what for what, _ in w.host.net.done if what == "plug"]
    assert w.host.libvirt.domains == {}


# -- what withstands -------------------------------------------------------------------------------------


def test_a_cell_that_does_not_close_stays_open_with_its_room(lab: Lab, w: Workbench) -> None:
    cell = lab.open_cell(CellRequest()).id
    w.host.libvirt.refuse = {"destroy origin"}
    with pytest.raises(LabError):
        lab.close_cell(cell)
    assert [(c.id, c.state, c.machines) for c in lab.cells()] == [(cell, "cut", ("origin",))]
    assert lab._desk._grants.owners() == {cell}
    with pytest.raises(LabError, match="cut for good"):
        lab.reset(cell, "origin")
    assert lab.kill("a drill").problems, "the switch still knows it"
    w.host.libvirt.refuse = set()
    lab.close_cell(cell)
    assert lab.cells() == []
    assert lab._desk._grants.owners() == set()
    assert w.host.left == []


def test_a_trial_whose_machine_withstands_leaves_its_cell_to_be_closed(lab: Lab, w: Workbench) -> None:
    w.host.libvirt.refuse = {"destroy target-1"}
    trial = lab.create_trial(ASKED).id
    ended(lab, trial)
    wait_for(lambda: not lab.health().trials_running)
    assert [(c.id, c.trial, c.machines) for c in lab.cells()] == [(trial, None, ("target-1",))]
    assert lab._desk._grants.owners() == {trial}
    assert w.host.net.plugged == {}
    w.host.libvirt.refuse = set()
    assert lab.close_cell(trial).state == "closed"
    assert lab._desk._grants.owners() == set()
    assert w.host.left == []


def test_a_request_that_outlasts_the_switch_puts_no_machine_into_a_closed_cell(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "_CLAIMS_S", 0.1)
    cell, failures = lab.open_cell(CellRequest()).id, list[HotcellError]()
    held = Held(w)

    def reset() -> None:
        try:
            lab.reset(cell, "target-1")
        except HotcellError as e:
            failures.append(e)

    thread = threading.Thread(target=reset)
    thread.start()
    assert held.begun.wait(20)
    problems = lab.kill("a drill").problems
    assert "it is cut, but still open" in problems[0]
    assert [c.id for c in lab.cells()] == [cell]
    held.go.set()
    thread.join(20)
    assert "cut for good" in str(failures[0])
    lab.close_cell(cell)
    assert w.host.left == []


def test_the_warden_is_dismissed_only_if_nothing_withstood(w: Workbench) -> None:
    warden = FakeWarden()
    lab = Lab(w.bench, SETTINGS, load_library(), warden, {})  # type: ignore[arg-type]
    lab.open_cell(CellRequest())
    w.host.libvirt.refuse = {"destroy origin"}
    lab.close()
    assert (warden.left_alone, warden.dismissed) == (True, False)
    assert w.host.libvirt.closed


def test_the_warden_is_not_dismissed_while_a_request_still_makes_a_machine(
    w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "_CLAIMS_S", 0.1)
    warden = FakeWarden()
    lab = Lab(w.bench, SETTINGS, load_library(), warden, {})  # type: ignore[arg-type]
    cell = lab.open_cell(CellRequest()).id
    held = Held(w)

    def reset() -> None:
        with suppress(Exception):  # its ledger is closed meanwhile
            lab.reset(cell, "target-1")

    thread = threading.Thread(target=reset)
    thread.start()
    assert held.begun.wait(20)
    lab.close()
    held.go.set()
    thread.join(20)
    assert (warden.left_alone, warden.dismissed) == (True, False)


# -- resets ----------------------------------------------------------------------------------------------


def test_a_reset_takes_no_standby_from_others(lab: Lab, w: Workbench) -> None:
    w.no_room = ""
    theirs = publish_one(w.host, "theirs")
    w.bench.standbys.keep("a-running-trial", [theirs])
    assert w.bench.standbys.wait_ready(5)
    cell = lab.open_cell(CellRequest()).id
    lab.reset(cell, "target-1")
    assert w.bench.standbys.wait_ready(5)
    assert theirs.id in w.bench.standbys.ready()
    assert len(w.bench.standbys.ready()) == 3


def test_a_reset_that_succeeded_does_not_fail_for_its_standbys(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = lab.open_cell(CellRequest()).id
    with monkeypatch.context() as patch:
        patch.setattr(w.bench.standbys, "keep", lambda *_: 1 / 0)
        assert lab.reset(cell, "origin").proved
        assert all(r.proved for r in lab.reset_cell(cell))


def test_a_machine_lost_in_a_reset_comes_back_with_the_next(lab: Lab, w: Workbench) -> None:
    cell = lab.open_cell(CellRequest()).id
    ways: list[Callable[[], list[ResetView]]] = [
        lambda: [lab.reset(cell, "target-1")],
        lambda: lab.reset_cell(cell),
    ]
    for again in ways:
        w.host.unproved = {"target-1"}
        with pytest.raises(ResetError):
            lab.reset(cell, "target-1")
        assert [m.name for m in lab.machines()] == ["origin"]
        w.host.unproved = set()
        assert "target-1" in {v.machine for v in again()}
        assert [(m.name, m.link_up) for m in lab.machines()] == [("origin", True), ("target-1", True)]


def test_with_all_machines_lost_a_reset_brings_back_all(lab: Lab, w: Workbench) -> None:
    cell = lab.open_cell(CellRequest()).id
    w.host.unproved = {"origin", "target-1"}
    with pytest.raises(ResetError):
        lab.reset_cell(cell)
    assert lab.machines() == []
    w.host.unproved = set()
    assert [v.machine for v in lab.reset_cell(cell)] == ["origin", "target-1"]


def test_a_machine_lost_in_a_snapshot_comes_back(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = lab.open_cell(CellRequest()).id

    def use_up(_shop: object, found: Cell, machine: str, *_: object) -> None:
        found.give_up(machine).destroy()
        raise LabError("QEMU refused")

    monkeypatch.setattr(cells_module, "snapshot", use_up)
    with pytest.raises(LabError, match="QEMU refused"):
        lab.snapshot(cell, "target-1", "mine")
    assert [m.name for m in lab.machines()] == ["origin"]
    assert lab.reset(cell, "target-1").proved
    assert len(lab.machines()) == 2


def test_what_never_was_a_machine_is_no_machine_to_reset(lab: Lab, w: Workbench) -> None:
    cell = lab.open_cell(CellRequest()).id
    with pytest.raises(NotFoundError, match="target-9"):
        lab.reset(cell, "target-9")
    lab._cells["empty"] = Cell("empty", w.host.shop)
    with pytest.raises(ConflictError, match="no machine to reset"):
        lab.reset_cell("empty")
    del lab._cells["empty"]
