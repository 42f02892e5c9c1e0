"""Standbys are proved before they wait, handed over whole, and never keep a reset from being honest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from appliance.cell import standby as standby_module
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation, OwnFile
from appliance.cell.ledger import Kind
from appliance.cell.libvirt_door import DomainState
from appliance.cell.proof import Proof
from appliance.cell.standby import STANDBY, StandbyPool
from appliance.cell.sweep import Ground, find_strays, remove
from appliance.errors import LabError, ResetError
from appliance.host.clock import wait_until
from tests.fakes.cells import Host, host

WAIT_S = 10


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host(monkeypatch) as made:
        monkeypatch.setattr(standby_module, "check_files", lambda _baseline: None)
        yield made


@pytest.fixture
def pool(h: Host) -> Iterator[StandbyPool]:
    made = StandbyPool(h.shop)
    yield made
    made.close()
    assert made.in_use == set()
    assert [t for t in h.ledger.things() if t.owner == STANDBY] == []


def cell(h: Host, pool: StandbyPool, *names: str) -> Cell:
    made = Cell("c1", h.shop, pool)
    made.open()
    made.restore_all([h.baseline(n) for n in names], lambda _p: None)
    made.plug_all()
    return made


def restores_when_told(h: Host) -> tuple[threading.Event, threading.Event]:
    """A restore says that it has begun, and ends when it may go on."""
    begun, go = threading.Event(), threading.Event()

    def slow(_clone: Incarnation) -> None:
        begun.set()
        assert go.wait(WAIT_S)

    h.on_restore = slow
    return begun, go


def test_what_stands_by_is_proved_paused_unplugged_and_written_down(h: Host, pool: StandbyPool) -> None:
    pool.keep("c1", [h.baseline("origin"), h.baseline("target-1")])
    assert pool.wait_ready(WAIT_S)
    machines = list(pool.ready().values())
    assert [m.state for m in machines] == [DomainState.PAUSED] * 2
    assert h.net.plugged == {}
    for kind, names in (
        (Kind.DOMAIN, {m.domain for m in machines}),
        (Kind.TAP, {m.spec.tap for m in machines}),
        (Kind.FOLDER, {str(m.folder) for m in machines}),
    ):
        assert {t.name for t in h.ledger.things(kind, STANDBY)} == names


def test_a_reset_takes_it_and_the_next_one_is_made(h: Host, pool: StandbyPool) -> None:
    c = cell(h, pool, "origin")
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    waiting = pool.ready()[h.baseline("origin").id]
    done = c.reset([h.baseline("origin")], lambda _p: None)[0]
    assert (done.machine, done.direct_because) == (waiting, "")
    assert done.proof.incarnation == waiting.id
    assert c.machine("origin") is waiting
    assert (waiting.state, waiting.plugged, waiting.cell) == (DomainState.RUNNING, True, "c1")
    assert h.net.plugged == {waiting.spec.tap: c.bridge}, "its own cell's segment, and it alone"
    assert {t.owner for t in h.ledger.things() if t.name in (waiting.domain, waiting.spec.tap)} == {"c1"}
    assert pool.wait_ready(WAIT_S)
    assert pool.ready()[h.baseline("origin").id] is not waiting
    c.close()
    pool.close()
    assert h.left == []


def test_a_trial_starts_from_standbys_unplugged(h: Host, pool: StandbyPool) -> None:
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    c = Cell("c2", h.shop, pool)
    c.open()
    done = c.restore_all([h.baseline("origin")], lambda _p: None)[0]
    assert done.direct_because == ""
    assert done.machine.state is DomainState.RUNNING
    assert h.net.plugged == {}
    c.close()


@pytest.mark.parametrize("why", ["no room: 12 MiB are free", ""])
def test_without_one_the_reset_is_direct_and_says_why(h: Host, why: str) -> None:
    pool = StandbyPool(h.shop, lambda _baseline: why)
    c = cell(h, pool, "origin")
    if why:
        pool.keep("c1", [h.baseline("origin")])
        assert not pool.wait_ready(WAIT_S)
        assert pool.missing() == {h.baseline("origin").id: why}
    done = c.reset([h.baseline("origin")], lambda _p: None)[0]
    assert done.direct_because == (why or "none is kept")
    assert done.proof.proved
    c.close()
    pool.close()
    assert h.left == []


def test_one_that_is_not_proved_never_stands_by(h: Host, pool: StandbyPool) -> None:
    h.unproved = {"origin"}
    pool.keep("c1", [h.baseline("origin")])
    assert not pool.wait_ready(WAIT_S)
    assert "withheld" in pool.missing()[h.baseline("origin").id]
    assert pool.ready() == {}
    h.unproved = set()
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S), "asking again tries again"


def _resumed(m: Incarnation) -> None:
    m.resume()


def _gone(m: Incarnation) -> None:
    m._libvirt.destroy(m.domain)


def _exchanged(m: Incarnation) -> None:
    m.spec.overlay.rename(m.spec.overlay.with_name("aside"))
    m.spec.overlay.write_bytes(b"QFI\xfbanother")


def _lost(m: Incarnation) -> None:
    m.spec.overlay.unlink()


def _other_nvram(m: Incarnation) -> None:
    nvram = m.folder / "nvram.fd"
    nvram.write_bytes(b"that it was started with")
    m.own_files.append(OwnFile.made("NVRAM", nvram))
    nvram.rename(nvram.with_name("aside"))
    nvram.write_bytes(b"another")


def _plugged(m: Incarnation) -> None:
    m.plug()


def _another_process(m: Incarnation) -> None:
    m.pid = 1


@pytest.mark.parametrize(
    "change", [_resumed, _gone, _exchanged, _lost, _other_nvram, _plugged, _another_process]
)
def test_one_that_changed_while_it_waited_is_withheld(
    h: Host, pool: StandbyPool, change: Callable[[Incarnation], None]
) -> None:
    c = cell(h, pool, "origin")
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    bad = pool.ready()[h.baseline("origin").id]
    change(bad)
    done = c.reset([h.baseline("origin")], lambda _p: None)[0]
    assert done.machine is not bad
    assert "withheld" in done.direct_because
    assert done.proof.proved
    assert bad.spec.tap not in h.net.plugged
    c.close()


def test_a_changed_baseline_file_is_noticed_before_its_standby_is_used(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = cell(h, pool, "origin")
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)

    def changed(_baseline: object) -> None:
        raise ResetError("ram is not what was saved")

    monkeypatch.setattr(standby_module, "check_files", changed)
    done = c.reset([h.baseline("origin")], lambda _p: None)[0]
    assert done.direct_because == "withheld: ram is not what was saved"
    c.close()


def test_one_of_a_baseline_made_anew_is_not_taken(h: Host, pool: StandbyPool) -> None:
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    anew = h.baseline("origin").model_copy(update={"created": 2.0})
    found, why = pool.take(anew, "c1")
    assert (found, why) == (None, f"withheld: the standby of {anew.id}: the baseline was made anew")


def test_what_is_not_wanted_any_more_goes(h: Host, pool: StandbyPool) -> None:
    pool.keep("c1", [h.baseline("origin"), h.baseline("target-1")])
    assert pool.wait_ready(WAIT_S)
    pool.keep("c1", [h.baseline("target-1")])
    assert [m.name for m in pool.ready().values()] == ["target-1"]
    assert pool.drop_all() == 1
    assert h.libvirt.domains == {}
    assert pool.take(h.baseline("target-1"), "c1") == (None, "none is kept")


def test_dropping_while_one_is_made_leaves_none(h: Host, pool: StandbyPool) -> None:
    begun, go = restores_when_told(h)
    pool.keep("c1", [h.baseline("origin")])
    assert begun.wait(WAIT_S)
    pool.drop_all()
    go.set()
    pool.close()
    assert pool.ready() == {}
    assert h.left == []


def test_two_resets_never_get_the_same_one(h: Host, pool: StandbyPool) -> None:
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    start, taken = threading.Barrier(4), list[Incarnation | None]()

    def take(n: int) -> None:
        start.wait()
        found, _ = pool.take(h.baseline("origin"), f"c{n}")
        if found is not None:
            taken.append(found.machine)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(taken) == len({m.id for m in taken if m})
    for machine in taken:
        assert machine is not None
        machine.destroy()


def test_a_ledger_without_its_rows_keeps_it_from_being_handed_over(h: Host, pool: StandbyPool) -> None:
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    machine = pool.ready()[h.baseline("origin").id]
    h.ledger.strike(Kind.TAP, machine.spec.tap)
    found, why = pool.take(h.baseline("origin"), "c1")
    assert found is None
    assert "the ledger has no tap" in why
    assert h.ledger.things(owner="c1") == [], "all rows change hands, or none"


@pytest.mark.parametrize("plugged", [True, False])
def test_one_that_does_not_wake_is_replaced(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch, plugged: bool
) -> None:
    """Its QEMU may have been stopped or killed since it was looked at."""

    def hangs() -> None:
        raise LabError("no answer within 30 s")

    c, told = Cell("c1", h.shop, pool), list[Proof]()
    c.open()
    if plugged:
        c.restore_all([h.baseline("origin")], lambda _p: None)
        c.plug_all()
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    waiting = pool.ready()[h.baseline("origin").id]
    monkeypatch.setattr(waiting, "resume", hangs)
    renew = c.reset if plugged else c.restore_all
    done = renew([h.baseline("origin")], told.append)[0]
    assert done.direct_because == "withheld: no answer within 30 s"
    assert c.machine("origin") is done.machine is not waiting
    assert [p.incarnation for p in told] == [waiting.id, done.machine.id], "every proof is told"
    assert done.machine.plugged is plugged
    assert waiting.spec.tap not in h.net.plugged
    c.close()
    pool.close()
    assert h.left == []


def test_nor_may_what_replaces_it_be_unproved(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, told = cell(h, pool, "origin", "target-1"), list[Proof]()
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    waiting = pool.ready()[h.baseline("origin").id]

    def hangs() -> None:
        h.unproved = {"origin"}
        raise LabError("no answer within 30 s")

    monkeypatch.setattr(waiting, "resume", hangs)
    why = r"^withheld: origin, 2 times \(RAM holds .*\); not from a standby: withheld: no answer"
    with pytest.raises(ResetError, match=why):
        c.reset([h.baseline(n) for n in ("origin", "target-1")], told.append)
    assert h.net.plugged == {}, "the other one of the group had been plugged in before"
    assert [(p.machine, p.proved) for p in told if p.machine == "origin"] == [
        ("origin", True),
        ("origin", False),
        ("origin", False),
    ], "every proof is told"
    h.unproved = set()
    c.close()


def test_if_nothing_can_be_resumed_that_is_an_error(h: Host, pool: StandbyPool) -> None:
    c = cell(h, pool, "origin")
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    h.libvirt.refuse = {"resume origin"}
    with pytest.raises(LabError, match="resume"):
        c.reset([h.baseline("origin")], lambda _p: None)
    h.libvirt.refuse = set()
    c.close()


def test_the_next_one_is_not_made_while_somebody_is_in_a_hurry(h: Host, pool: StandbyPool) -> None:
    with pool.undisturbed(), pool.undisturbed():
        pool.keep("c1", [h.baseline("origin")])
        assert not pool.wait_ready(0.2)
        assert h.restored == []
    assert pool.wait_ready(WAIT_S)


def test_a_pool_is_closed_whoever_is_in_a_hurry(h: Host, pool: StandbyPool) -> None:
    before = set(threading.enumerate())
    with pool.undisturbed():
        pool.keep("c1", [h.baseline("origin")])
        pool.close()
        assert set(threading.enumerate()) <= before
    assert h.restored == []


def test_nobody_is_in_a_hurry_for_long(h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby_module, "_HURRY_S", 0.2)
    with pool.undisturbed():
        pool.keep("c1", [h.baseline("origin")])
        assert not pool.wait_ready(0.05)
        with pool.undisturbed():
            assert pool.wait_ready(WAIT_S)


def test_the_next_one_is_made_after_the_reset(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = cell(h, pool, "origin")
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    waiting, before, seen = pool.ready()[h.baseline("origin").id], len(h.restored), []
    resume = waiting.resume

    def slowly() -> None:
        time.sleep(0.2)
        seen.append(len(h.restored))
        resume()

    monkeypatch.setattr(waiting, "resume", slowly)
    c.reset([h.baseline("origin")], lambda _p: None)
    assert seen == [before]
    assert pool.wait_ready(WAIT_S)
    c.close()


@pytest.mark.parametrize("fault", [OSError, LabError])
def test_whatever_keeps_one_from_waking_none_of_its_group_stays_plugged(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    c = cell(h, pool, "origin", "target-1")
    both = [h.baseline(n) for n in ("origin", "target-1")]
    pool.keep("c1", both)
    assert pool.wait_ready(WAIT_S)

    def hangs() -> None:
        def fails(_clone: Incarnation) -> None:
            raise fault("no space is left")

        h.on_restore = fails
        raise LabError("no answer within 30 s")

    monkeypatch.setattr(pool.ready()[both[0].id], "resume", hangs)
    with pytest.raises(fault, match="no space"):
        c.reset(both, lambda _p: None)
    assert h.net.plugged == {}
    h.on_restore = lambda _clone: None
    c.close()


def test_a_segment_that_cannot_be_made_is_tried_again(h: Host, pool: StandbyPool) -> None:
    h.net.refuse = {"create_bridge"}
    pool.keep("c1", [h.baseline("origin")])
    assert not pool.wait_ready(WAIT_S)
    assert h.left == []
    h.net.refuse = set()
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)


# -- what withstands -------------------------------------------------------------------------------------


def ground(h: Host) -> Ground:
    return Ground(h.paths, h.libvirt, h.ledger, links=True)  # type: ignore[arg-type]


def strays(h: Host, pool: StandbyPool) -> list[str]:
    return [s.name for s in find_strays(ground(h), lambda: pool.in_use, pool.lost)]


def lose_one(h: Host, pool: StandbyPool) -> Incarnation:
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    machine = pool.ready()[h.baseline("origin").id]
    h.libvirt.refuse = {"destroy"}
    pool.drop_all()
    h.libvirt.refuse = set()
    assert machine.state is DomainState.PAUSED
    assert pool.ready() == {}
    return machine


def test_one_that_withstands_is_a_stray_and_others_are_not(h: Host, pool: StandbyPool) -> None:
    lost = lose_one(h, pool)
    assert strays(h, pool) == [lost.domain]
    h.libvirt.refuse = {"destroy origin"}
    pool.keep("c1", [h.baseline("target-1")])
    assert pool.wait_ready(WAIT_S)
    assert strays(h, pool) == [lost.domain], "what stands by and its segment are in use"
    h.libvirt.refuse = set()
    found = find_strays(ground(h), lambda: pool.in_use, pool.lost)
    assert all(s.removed for s in remove(found, ground(h)))
    assert lost.state is DomainState.GONE
    assert [m.state for m in pool.ready().values()] == [DomainState.PAUSED]
    assert strays(h, pool) == []


def _another_is_made(h: Host, pool: StandbyPool) -> None:
    pool.keep("c1", [h.baseline("target-1")])
    assert pool.wait_ready(WAIT_S)


def _its_baseline_goes(h: Host, pool: StandbyPool) -> None:
    pool.drop(h.baseline("origin").id)


@pytest.mark.parametrize("then", [_another_is_made, _its_baseline_goes])
def test_one_that_withstood_is_tried_again(
    h: Host, pool: StandbyPool, then: Callable[[Host, StandbyPool], None]
) -> None:
    lost = lose_one(h, pool)
    then(h, pool)
    assert lost.state is DomainState.GONE
    assert strays(h, pool) == []


def test_a_pool_that_is_closed_tries_again_too(h: Host, pool: StandbyPool) -> None:
    lose_one(h, pool)
    pool.close()
    assert h.left == []


def test_one_that_is_being_made_is_nobodys_stray(h: Host, pool: StandbyPool) -> None:
    seen = list[list[str]]()
    lost = lose_one(h, pool)
    h.libvirt.refuse = {"destroy origin"}
    h.on_restore = lambda _clone: seen.append(strays(h, pool))
    pool.keep("c1", [h.baseline("target-1")])
    assert pool.wait_ready(WAIT_S)
    assert seen == [[lost.domain]]
    h.libvirt.refuse = set()


def test_what_a_making_that_failed_left_is_a_stray(h: Host, pool: StandbyPool) -> None:
    def fails(clone: Incarnation) -> None:
        h.libvirt.refuse = {"destroy"}
        raise LabError("no answer")

    h.on_restore = fails
    pool.keep("c1", [h.baseline("origin")])
    assert not pool.wait_ready(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while not (found := strays(h, pool)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == list(h.libvirt.domains)
    h.libvirt.refuse = set()
    assert all(s.removed for s in remove(find_strays(ground(h), lambda: pool.in_use, pool.lost), ground(h)))


def test_one_that_is_handed_over_is_nobodys_stray(h: Host, pool: StandbyPool) -> None:
    c = cell(h, pool, "origin")
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    pool.take(h.baseline("origin"), "c1")
    assert find_strays(ground(h), lambda: {"c1", *pool.in_use}, pool.lost) == []
    assert all(s.removed for s in remove(find_strays(ground(h), lambda: pool.in_use, pool.lost), ground(h)))
    c.close()


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), ValueError("odd")])
def test_whatever_is_wrong_with_what_was_taken_it_ends(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fails(_baseline: object) -> None:
        raise fault

    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    waiting = pool.ready()[h.baseline("origin").id]
    monkeypatch.setattr(standby_module, "check_files", fails)
    found, why = pool.take(h.baseline("origin"), "c1")
    assert (found, why) == (None, f"withheld: {type(fault).__name__}: {fault}")
    assert waiting.state is DomainState.GONE
    assert str(waiting.folder) not in {t.name for t in h.ledger.things()}


# -- whose wish it is ------------------------------------------------------------------------------------


def names(pool: StandbyPool) -> set[str]:
    return {m.name for m in pool.ready().values()}


def test_what_one_owner_wishes_takes_nothing_from_another(h: Host, pool: StandbyPool) -> None:
    pool.keep("c1", [h.baseline("origin")])
    pool.keep("c2", [h.baseline("target-1")])
    assert pool.wait_ready(WAIT_S)
    assert names(pool) == {"origin", "target-1"}
    pool.keep("c2", [h.baseline("world")])
    assert pool.wait_ready(WAIT_S)
    assert names(pool) == {"origin", "world"}


def test_those_of_the_last_owner_that_ended_stay_for_the_next(h: Host, pool: StandbyPool) -> None:
    pool.keep("t1", [h.baseline("origin")])
    pool.keep("t2", [h.baseline("target-1")])
    assert pool.wait_ready(WAIT_S)
    pool.forget("t1")
    pool.forget("t1")
    pool.forget("nobody")
    assert names(pool) == {"origin", "target-1"}
    pool.forget("t2")
    assert names(pool) == {"target-1"}
    found, _ = pool.take(h.baseline("target-1"), "t3")
    assert found is not None
    assert pool.missing() == {}, "none is made again before the next owner has time for it"
    found.machine.destroy()


def test_those_of_who_ended_make_way_for_who_is_there(h: Host) -> None:
    pool = StandbyPool(h.shop, lambda _baseline: "no room" if h.libvirt.domains else "")
    pool.keep("t1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    pool.keep("t2", [h.baseline("target-1")])
    assert not pool.wait_ready(WAIT_S)
    assert names(pool) == {"origin"}, "that of one who is there stays"
    pool.forget("t1")
    pool.keep("t2", [h.baseline("target-1")])
    assert pool.wait_ready(WAIT_S)
    assert names(pool) == {"target-1"}
    pool.close()
    assert h.left == []


def test_those_given_up_are_made_again_when_there_is_room(h: Host, pool: StandbyPool) -> None:
    pool.keep("t1", [h.baseline("world")])
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    pool.forget("t1")
    before = len(h.restored)
    assert pool.give_up("given up for a trial") == 2
    assert h.libvirt.domains == {}
    assert pool.missing() == {h.baseline("origin").id: "given up for a trial"}
    assert pool.take(h.baseline("origin"), "c1") == (None, "given up for a trial")
    assert not pool.wait_ready(WAIT_S)
    assert len(h.restored) == before, "not before it is tried again"
    pool.try_again()
    assert pool.wait_ready(WAIT_S)
    assert names(pool) == {"origin"}, "of who has ended nothing is made again"


def test_what_somebody_who_ended_held_is_made_again_for_others(h: Host) -> None:
    pool = StandbyPool(h.shop, lambda _baseline: "no room" if h.libvirt.domains else "")
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    pool.give_up("given up for a trial")
    pool.keep("t1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    pool.keep("c1", [h.baseline("target-1")])
    assert not pool.wait_ready(WAIT_S)
    assert pool.missing() == {h.baseline("target-1").id: "no room"}
    pool.forget("t1")
    assert pool.wait_ready(WAIT_S)
    assert names(pool) == {"target-1"}
    pool.close()
    assert h.left == []


def test_what_one_who_ended_did_without_is_not_made_in_the_room_it_gives_back(
    h: Host, pool: StandbyPool
) -> None:
    pool.keep("t1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    pool.give_up("given up for a cell")
    pool.forget("t1")
    pool.keep("t2", [h.baseline("target-1")])
    pool.try_again()
    assert not pool.wait_ready(WAIT_S)
    assert names(pool) == {"target-1"}
    assert pool.missing() == {h.baseline("origin").id: "given up for a cell"}


def test_a_making_that_fails_is_told_although_room_came_meanwhile(h: Host, pool: StandbyPool) -> None:
    def fails(_clone: Incarnation) -> None:
        pool.try_again()
        raise LabError("QEMU refused")

    h.on_restore = fails
    pool.keep("c1", [h.baseline("origin")])
    assert not pool.wait_ready(WAIT_S)
    assert pool.missing() == {h.baseline("origin").id: "QEMU refused"}


def test_room_that_comes_while_it_is_looked_for_is_seen(h: Host) -> None:
    answers = ["no room"]

    def room(_machine: object) -> str:
        why = answers.pop() if answers else ""
        if why:
            made.try_again()
        return why

    made = StandbyPool(h.shop, room)
    made.keep("c1", [h.baseline("origin")])
    assert made.wait_ready(WAIT_S)
    made.close()
    assert h.left == []


def test_one_in_the_making_is_given_up_too(h: Host, pool: StandbyPool) -> None:
    begun, go = restores_when_told(h)
    pool.keep("c1", [h.baseline("origin")])
    assert begun.wait(WAIT_S)
    pool.give_up("given up for a trial")
    go.set()
    h.on_restore = lambda _clone: None
    pool.keep("c2", [h.baseline("target-1")])
    pool.give_up("given up for a cell")
    assert set(pool.missing().values()) == {"given up for a cell"}


def test_a_baseline_that_is_dropped_is_nobodys_wish(h: Host, pool: StandbyPool) -> None:
    for owner in ("c1", "c2"):
        pool.keep(owner, [h.baseline("origin"), h.baseline("target-1")])
    assert pool.wait_ready(WAIT_S)
    pool.drop(h.baseline("origin").id)
    assert names(pool) == {"target-1"}
    assert pool.missing() == {}


def test_dropping_one_that_is_being_made_waits_for_its_end(h: Host, pool: StandbyPool) -> None:
    begun = threading.Event()

    def slow(_clone: Incarnation) -> None:
        begun.set()
        time.sleep(0.3)

    h.on_restore = slow
    pool.keep("c1", [h.baseline("origin")])
    assert begun.wait(WAIT_S)
    pool.drop(h.baseline("origin").id)
    assert h.libvirt.domains == {}
    assert not list(h.paths.cells.glob("*/*/disk.qcow2"))


def boots_slowly(h: Host, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Machines that answer only after minutes, or are seen to be gone; the event says that one boots."""
    booting = threading.Event()
    real = standby_module.prove  # type: ignore[attr-defined] # the one in memory

    def prove(clone: Incarnation, *args: object, **more: object) -> Proof:
        booting.set()
        wait_until(lambda: clone.state is DomainState.GONE, WAIT_S, "it to be killed", interval=0.01)
        h.unproved = {clone.name}
        return real(clone, *args, **more)  # type: ignore[arg-type]

    def kill(clone: Incarnation) -> bool:
        h.libvirt.lose(clone.name)
        return True

    monkeypatch.setattr(standby_module, "prove", prove)
    monkeypatch.setattr(Incarnation, "kill", kill)
    return booting


@pytest.mark.parametrize("way", ["drop", "keep", "forget", "give_up", "drop_all", "close"])
def test_one_that_boots_and_that_nobody_wants_any_more_is_killed(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    booting, origin = boots_slowly(h, monkeypatch), h.baseline("origin")
    pool.keep("c1", [origin])
    assert booting.wait(WAIT_S)
    began = time.monotonic()
    if way == "forget":  # what the last one that ended had wished is still made, until another one has ended
        pool.forget("c1")
        assert h.libvirt.domains
        pool.keep("c2", [])
    ask: dict[str, Callable[[], object]] = {
        "drop": lambda: pool.drop(origin.id), "keep": lambda: pool.keep("c1", []),
        "forget": lambda: pool.drop(origin.id),
        "give_up": lambda: pool.give_up("a trial needs the room"), "drop_all": pool.drop_all, "close": pool.close,
    }  # fmt: skip
    ask[way]()
    wait_until(lambda: h.libvirt.domains == {}, 5, "it to be gone", interval=0.01)
    assert time.monotonic() - began < WAIT_S / 2
    told = "a trial needs the room" if way == "give_up" else None
    assert pool.missing().get(origin.id) == told, "and not that it failed"


def test_so_is_one_that_nobody_wanted_before_it_ran(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = restores_when_told(h)
    booting = boots_slowly(h, monkeypatch)
    pool.keep("c1", [h.baseline("origin")])
    assert begun.wait(WAIT_S)
    pool.keep("c1", [])
    go.set()
    assert booting.wait(WAIT_S)
    wait_until(lambda: h.libvirt.domains == {}, 5, "it to be gone", interval=0.01)


def test_one_that_is_wanted_still_is_left_alone(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    booting, origin = boots_slowly(h, monkeypatch), h.baseline("origin")
    pool.keep("c1", [origin])
    assert booting.wait(WAIT_S)
    pool.keep("c1", [origin, h.baseline("target-1")])
    pool.keep("c2", [origin])
    pool.forget("c1")
    pool.drop(h.baseline("target-1").id)
    assert [n for n in h.libvirt.domains if "origin" in n]


def test_of_a_machine_with_a_device_none_stands_by_and_others_stay(h: Host, pool: StandbyPool) -> None:
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    pool.forget("c1")
    saved = h.baseline("target-1")
    machine = saved.machine.model_copy(update={"devices": ("0000:01:00.0",)})
    pool.keep("c2", [saved.model_copy(update={"machine": machine})])
    assert pool.missing() == {}
    assert names(pool) == {"origin"}
    assert pool.take(saved, "c2") == (None, "none is kept")


def test_dropping_does_not_wait_for_others_nor_for_long(
    h: Host, pool: StandbyPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = restores_when_told(h)
    pool.keep("c1", [h.baseline("origin")])
    assert begun.wait(WAIT_S)
    began = time.monotonic()
    pool.drop(h.baseline("target-1").id)
    monkeypatch.setattr(standby_module, "_DROP_S", 0.1)
    pool.drop(h.baseline("origin").id)
    assert time.monotonic() - began < standby_module._CLOSE_S / 20
    go.set()


def test_a_host_that_cannot_be_measured_does_not_end_the_making_for_good(h: Host) -> None:
    broken = [True]

    def room(_machine: object) -> str:
        if broken:
            raise OSError(24, "Too many open files")
        return ""

    pool = StandbyPool(h.shop, room)
    pool.keep("c1", [h.baseline("origin")])
    assert not pool.wait_ready(WAIT_S)
    assert "Too many open files" in pool.missing()[h.baseline("origin").id]
    broken.clear()
    pool.keep("c1", [h.baseline("origin")])
    assert pool.wait_ready(WAIT_S)
    pool.close()
