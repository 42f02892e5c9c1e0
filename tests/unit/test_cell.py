"""A cell: nothing is plugged before every proof, nothing is left at its end, no failure hides another machine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Iterator

import pytest

from appliance.cell import cell as cell_module
from appliance.cell import netlink, overlay
from appliance.cell.baseline import NVRAM, Baseline, ColdExpected, DiskBaseline, FileFact
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind
from appliance.cell.libvirt_door import DomainState
from appliance.cell.processes import is_domain_process, kill_domain_process
from appliance.cell.proof import Proof
from appliance.errors import CommandError, LabError, NotFoundError, PrerequisiteError, ResetError
from appliance.host.clock import wait_until
from appliance.model import Firmware
from tests.fakes.cells import Host, host
from tests.fakes.machine import is_domain_name

ALL = ("origin", "target-1", "world")


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host(monkeypatch) as made:
        yield made


def test_a_cells_life(h: Host) -> None:
    cell = h.cell(*ALL)
    assert tuple(cell.machines) == ALL
    assert h.net.plugged == {}
    assert all(m.state is DomainState.RUNNING for m in cell.machines.values())
    assert all(is_domain_name(m.domain) for m in cell.machines.values())
    cell.plug_all()
    assert set(h.net.plugged.values()) == {cell.bridge}
    assert all(m.plugged for m in cell.machines.values())
    cell.cut()
    assert h.net.plugged == {}
    cell.close()
    assert h.left == []


def test_everything_has_its_row_before_it_exists(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each moment something is made, its row is there already."""
    seen: list[str] = []

    def rows(kind: Kind) -> set[str]:
        return {t.name for t in h.ledger.things(kind)}

    make_bridge, start, make_overlay = h.net.create_bridge, h.libvirt.start, overlay.create_overlay

    def bridge(name: str, anchor: str = "") -> None:
        assert name in rows(Kind.BRIDGE)
        assert not anchor or anchor in rows(Kind.ANCHOR)
        seen.append("bridge")
        make_bridge(name, anchor)

    def domain(xml: str, *, paused: bool) -> None:
        assert any(f"<name>{name}</name>" in xml for name in rows(Kind.DOMAIN))
        assert any(f'dev="{name}"' in xml for name in rows(Kind.TAP))
        assert paused, "a machine that runs before it is cut off could send"
        seen.append("domain")
        start(xml, paused=paused)

    def disk(top: object, backing: object) -> None:
        assert str(top).rpartition("/")[0] in rows(Kind.FOLDER)
        seen.append("overlay")
        make_overlay(top, backing)  # type: ignore[arg-type]

    monkeypatch.setattr(netlink, "create_bridge", bridge)
    monkeypatch.setattr(h.libvirt, "start", domain)
    monkeypatch.setattr(overlay, "create_overlay", disk)
    h.cell("origin").close()
    assert seen == ["bridge", "overlay", "domain"]


def test_a_machine_is_cut_off_before_it_first_runs(h: Host) -> None:
    h.on_restore = lambda clone: seen.append(("unplug", clone.spec.tap) in h.net.done)
    seen: list[bool] = []
    h.cell("origin", cell_id="c2")
    assert seen == [True], "the tap was off its bridge before the clone was resumed"


def test_one_machine_without_proof_keeps_all_unplugged(h: Host) -> None:
    h.unproved = {"target-1"}
    cell, proofs = Cell("c1", h.shop), list[Proof]()
    cell.open()
    with pytest.raises(ResetError, match="withheld: target-1"):
        cell.restore_all([h.baseline(n) for n in ALL], proofs.append)
    told = ["origin", "target-1", "target-1", "world"]
    assert [p.machine for p in proofs] == told, "every proof is told, also the failed ones"
    assert "target-1" not in cell.machines, "what is not proved is destroyed"
    assert h.net.plugged == {}
    cell.close()
    assert h.left == []


def test_a_machine_that_does_not_restore_leaves_none_behind(h: Host) -> None:
    h.broken = {"target-1"}
    cell = Cell("c1", h.shop)
    cell.open()
    with pytest.raises(OSError, match="target-1"):
        cell.restore_all([h.baseline(n) for n in ALL], lambda _p: None)
    cell.close()
    assert h.left == []


def test_an_unproved_machine_that_withstands_stays_known(h: Host) -> None:
    h.unproved, h.libvirt.refuse = {"origin"}, {"destroy origin"}
    cell = Cell("c1", h.shop)
    cell.open()
    with pytest.raises(ResetError):
        cell.restore_all([h.baseline("origin")], lambda _p: None)
    assert "origin" not in cell.machines, "what is not proved is nobody's machine"
    h.libvirt.refuse = set()
    cell.close()
    assert h.left == []


def test_an_overlay_that_cannot_be_made_leaves_nothing(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(top: object, backing: object) -> None:
        raise CommandError("qemu-img: No space left on device")

    monkeypatch.setattr(overlay, "create_overlay", full)
    cell = Cell("c1", h.shop)
    cell.open()
    with pytest.raises(CommandError):
        cell.restore_all([h.baseline("origin")], lambda _p: None)
    cell.close()
    assert h.left == []


@pytest.mark.parametrize("refused", ["destroy origin", "destroy target-1"])
def test_a_machine_that_cannot_be_destroyed_does_not_save_the_others(h: Host, refused: str) -> None:
    cell = h.cell(*ALL)
    cell.plug_all()
    h.libvirt.refuse = {refused}
    with pytest.raises(LabError):
        cell.close()
    assert h.net.plugged == {}, "all are cut"
    survivor = refused.split(" ")[1]
    assert len(h.libvirt.domains) == 1
    assert [t.kind for t in h.ledger.things(Kind.DOMAIN)] == [Kind.DOMAIN], "its row stays for the sweep"
    assert list(cell.machines) == [survivor]
    h.libvirt.refuse = set()
    cell.close()
    assert h.left == []


def test_a_link_that_cannot_be_cut_does_not_save_its_machine(h: Host) -> None:
    cell = h.cell(*ALL)
    cell.plug_all()
    h.net.refuse = {"unplug"}
    with pytest.raises(LabError):
        cell.close()
    assert h.libvirt.domains == {}


def test_cut_tries_every_link_and_says_how_many_failed(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = h.cell(*ALL)
    cell.plug_all()
    first = next(iter(cell.machines.values()))

    def no(self: object = None) -> None:
        raise LabError("no")

    monkeypatch.setattr(first, "unplug", no)
    with pytest.raises(LabError, match="1 links were not cut"):
        cell.cut()
    assert len(h.net.plugged) == 1


def test_whatever_keeps_one_link_from_being_cut_the_next_one_is(
    h: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = h.cell(*ALL)
    cell.plug_all()

    def no(self: object = None) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(cell.machine("origin"), "unplug", no)
    cut = cell.condemn()
    assert (cut.links, cut.failed) == (2, 1)
    assert "Too many open files" in cut.problem("c1")
    assert len(h.net.plugged) == 1
    with pytest.raises(LabError, match="1 links were not cut"):
        cell.cut()
    with pytest.raises(OSError, match="Too many"):
        cell.reset([h.baseline(n) for n in ALL], lambda _p: None)
    assert list(cell.machines) == ["origin"], "the others were cut and stopped all the same"


def test_a_condemned_cell_is_never_plugged_again(h: Host) -> None:
    cell = h.cell("origin")
    cell.plug_all()
    cell.condemn()
    assert h.net.plugged == {}
    with pytest.raises(LabError, match="cut for good"):
        cell.plug_all()
    assert h.net.plugged == {}
    cell.close()


def test_condemning_while_another_thread_plugs_leaves_nothing_plugged(h: Host) -> None:
    cell = h.cell(*ALL)
    start = threading.Barrier(2)
    failures: list[Exception] = []

    def plug() -> None:
        start.wait()
        try:
            for _ in range(50):
                cell.plug_all()
        except LabError as e:
            failures.append(e)

    thread = threading.Thread(target=plug)
    thread.start()
    start.wait()
    cell.condemn()
    thread.join()
    assert h.net.plugged == {}
    assert len(failures) <= 1


def test_a_reset_gives_a_new_incarnation_plugged_and_ends_the_old_one(h: Host) -> None:
    cell = h.cell("origin", "target-1")
    cell.plug_all()
    old = cell.machine("target-1")
    done = cell.reset([h.baseline("target-1")], lambda _p: None)[0]
    new = cell.machine("target-1")
    assert (done.proof.incarnation, new.plugged) == (new.id, True)
    assert done.direct_because == "no standbys are kept"
    assert 0 < done.answered_s <= done.seconds
    assert new.id != old.id
    assert not old.plugged
    assert len(h.net.plugged) == 2
    cell.close()
    assert h.left == []


@pytest.mark.parametrize("works", [True, False])
def test_the_old_one_is_taken_apart_when_the_new_one_is_there(
    h: Host, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    """Taking gigabytes of memory apart would take half the host from what is in a hurry."""
    monkeypatch.setattr(cell_module, "_HEAD_START_S", 60)
    cell = h.cell("origin")
    old = cell.machine("origin")
    seen = []

    def look(_clone: Incarnation) -> None:
        seen.append(old.domain in h.libvirt.domains)
        if not works:
            raise LabError("it does not restore")

    h.on_restore = look
    with contextlib.nullcontext() if works else pytest.raises(LabError):
        cell.reset([h.baseline("origin")], lambda _p: None)
    began = time.monotonic()
    cell.close()
    assert time.monotonic() - began < 30, "nobody waits for what has happened"
    assert seen == [True]
    assert h.left == []


def test_the_old_one_waits_no_longer_than_its_head_start(h: Host) -> None:
    cell = h.cell("origin")
    old = cell.machine("origin")

    def until_it_is_gone(_clone: Incarnation) -> None:
        assert old in cell.everything, "it holds memory until it is gone"
        wait_until(lambda: old.domain not in h.libvirt.domains, 10, "the old one to end")

    h.on_restore = until_it_is_gone
    cell.reset([h.baseline("origin")], lambda _p: None)
    cell.close()


def test_every_proof_is_told_also_beside_a_machine_that_does_not_restore(h: Host) -> None:
    cell, told = h.cell("origin", "target-1"), list[Proof]()
    h.broken, h.unproved = {"target-1"}, {"origin"}
    with pytest.raises(OSError, match="target-1"):
        cell.reset([h.baseline(n) for n in ("origin", "target-1")], told.append)
    assert [(p.machine, p.proved) for p in told] == [("origin", False)] * 2
    cell.close()
    assert h.left == []


def test_a_machine_whose_proof_breaks_off_is_ended(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = h.cell("origin")

    def breaks(*_: object) -> Proof:
        raise FileNotFoundError("the overlay")

    monkeypatch.setattr(cell_module, "prove", breaks)
    with pytest.raises(FileNotFoundError):
        cell.reset([h.baseline("origin")], lambda _p: None)
    assert cell.machines == {}
    cell.close()
    assert h.left == []


def test_the_old_one_is_cut_before_the_new_one_is_plugged(h: Host) -> None:
    cell = h.cell("origin")
    cell.plug_all()
    old = cell.machine("origin")
    h.net.done.clear()
    cell.reset([h.baseline("origin")], lambda _p: None)
    done = h.net.done
    assert done.index(("unplug", old.spec.tap)) < done.index(("plug", cell.machine("origin").spec.tap))


def test_a_link_that_is_not_cut_stops_the_reset(h: Host) -> None:
    cell = h.cell("origin")
    cell.plug_all()
    h.net.refuse = {"unplug"}
    old = cell.machine("origin")
    with pytest.raises(LabError):
        cell.reset([h.baseline("origin")], lambda _p: None)
    assert cell.machine("origin") is old
    h.net.refuse = set()


def test_an_old_incarnation_that_withstands_is_tried_again_at_the_end(h: Host) -> None:
    cell = h.cell("origin")
    h.libvirt.refuse = {"destroy origin"}
    cell.reset([h.baseline("origin")], lambda _p: None)
    with pytest.raises(LabError):
        cell.close()
    h.libvirt.refuse = set()
    cell.destroy_machines()
    assert h.left == []


def test_a_machine_whose_proof_fails_is_withheld_and_replaced(h: Host) -> None:
    cell, proofs = h.cell("origin", "target-1"), list[Proof]()
    cell.plug_all()
    bad = 1

    def fail_once(clone: Incarnation) -> None:
        nonlocal bad
        if clone.name == "target-1":
            h.unproved = {"target-1"} if bad else set()
            bad = 0

    h.on_restore = fail_once
    done = {
        r.machine.name: r for r in cell.reset([h.baseline(n) for n in ("origin", "target-1")], proofs.append)
    }
    assert [len(done[n].withheld) for n in ("origin", "target-1")] == [0, 1]
    withheld = done["target-1"].withheld[0]
    assert [p.proved for p in proofs if p.machine == "target-1"] == [False, True]
    assert withheld.incarnation != cell.machine("target-1").id
    taps = [m.spec.tap for m in h.restored if m.id == withheld.incarnation]
    assert not [x for x in h.net.done if x in [("plug", t) for t in taps]], (
        "the dirty one never was on a segment"
    )


def test_a_group_is_plugged_only_when_all_are_proved(h: Host) -> None:
    cell = h.cell("origin", "target-1")
    cell.plug_all()
    h.unproved = {"target-1"}
    with pytest.raises(ResetError, match="target-1"):
        cell.reset([h.baseline(n) for n in ("origin", "target-1")], lambda _p: None)
    assert h.net.plugged == {}
    assert not cell.machine("origin").plugged


def test_a_machine_that_was_lost_comes_back(h: Host) -> None:
    cell = h.cell("origin", "target-1")
    cell.plug_all()
    h.unproved = {"target-1"}
    with pytest.raises(ResetError):
        cell.reset([cell.baseline("target-1")], lambda _p: None)
    assert list(cell.machines) == ["origin"]
    assert list(cell.baselines) == ["origin", "target-1"]
    with pytest.raises(NotFoundError, match="lost") as e:
        cell.machine("target-1")
    assert "a reset brings target-1 back" in e.value.hint
    with pytest.raises(NotFoundError, match="target-7"):
        cell.baseline("target-7")
    h.unproved = set()
    cell.reset(list(cell.baselines.values()), lambda _p: None)
    assert list(cell.machines) == ["origin", "target-1"]
    assert len(h.net.plugged) == 2


def test_a_machine_remembers_the_last_baseline_that_it_was_proved_against(h: Host) -> None:
    cell = h.cell("origin")
    other = h.baseline("origin").model_copy(update={"folder": h.paths.baselines / "other"})
    h.unproved = {"origin"}
    with pytest.raises(ResetError):
        cell.reset([other], lambda _p: None)
    assert cell.baseline("origin") == h.baseline("origin")
    h.unproved = set()
    cell.reset([other], lambda _p: None)
    assert cell.baseline("origin") == other


def test_who_looks_at_the_machines_while_one_is_lost_sees_a_copy(h: Host) -> None:
    cell = h.cell(*ALL)
    h.unproved = {"origin"}
    seen = iter(cell.machines)
    assert next(seen) == "origin"
    with pytest.raises(ResetError):
        cell.reset([h.baseline("origin")], lambda _p: None)
    assert list(seen) == ["target-1", "world"]


def test_a_machine_that_comes_after_the_cell_was_condemned_is_ended(h: Host) -> None:
    cell = h.cell("origin")
    cell.plug_all()

    def condemn(_clone: Incarnation) -> None:
        cell.condemn()
        cell.close()
        assert cell.empty

    h.on_restore = condemn
    with pytest.raises(LabError, match="cut for good"):
        cell.reset([h.baseline("origin")], lambda _p: None)
    concurrent.futures.wait(cell._roster.take_ends())
    assert cell.empty, "who closed the cell did not see it, and nobody will close it again"
    assert h.net.plugged == {}
    assert h.libvirt.domains == {}
    h.on_restore = lambda _clone: pytest.fail("nothing is restored into a condemned cell")
    with pytest.raises(LabError, match="cut for good"):
        cell.reset([h.baseline("origin")], lambda _p: None)


def test_a_machine_by_an_unknown_name_is_told_with_the_known_ones(h: Host) -> None:
    with pytest.raises(NotFoundError) as e:
        h.cell("origin", "world").machine("target-7")
    assert "origin, world" in e.value.hint


def test_destroy_may_be_repeated_and_close_too(h: Host) -> None:
    cell = h.cell("origin")
    machine = cell.machine("origin")
    machine.destroy()
    machine.destroy()
    cell.close()
    cell.close()
    assert h.left == []


def test_destroy_of_a_machine_that_powered_off_by_itself(h: Host) -> None:
    cell = h.cell("origin")
    h.libvirt.power_off("origin")
    cell.close()
    assert h.left == []


def test_the_console_is_printable_and_bounded(h: Host) -> None:
    machine = h.cell("origin").machine("origin")
    assert machine.console_tail() == ""
    machine.spec.serial_log.write_bytes(b"x" * 100_000 + b"\x1b[2J\x00\xff\nKernel panic\n")
    tail = machine.console_tail(2000)
    assert tail.endswith("Kernel panic\n")
    assert len(tail) <= 2000
    assert all(c.isprintable() or c == "\n" for c in tail)


def test_waiting_for_a_machine_that_went_down_ends_with_its_console(h: Host) -> None:
    machine = h.cell("origin").machine("origin")
    machine.spec.serial_log.write_text("end Kernel panic - not syncing\n")
    h.libvirt.power_off("origin")
    with pytest.raises(LabError, match="not syncing"):
        machine.wait_for_agent(5)


def test_a_pid_that_is_not_the_domains_is_never_killed() -> None:
    assert not is_domain_process(os.getpid(), "hc-c1-origin-0a1b2c3d")
    assert not kill_domain_process(os.getpid(), "hc-c1-origin-0a1b2c3d")
    assert not kill_domain_process(None, "x")
    assert not kill_domain_process(1 << 22, "x")
    assert not is_domain_process(1 << 22, "x")


# -- machines with devices, and with firmware --------------------------------------------------------------


def with_device(h: Host) -> Baseline:
    made = h.baseline("target-1")
    cold = ColdExpected(boot_id="b0", nonce="n0", chain=())
    fields = {k: v for k, v in dict(made).items() if k not in ("kind", "expected", "memory")}
    machine = made.machine.model_copy(update={"devices": ("0000:01:00.0",), "firmware": Firmware.UEFI})
    size = h.uefi.variables.stat().st_size
    fields["files"] = {NVRAM: FileFact(sha256="", size=size, inode=0, mtime_ns=0, ctime_ns=0)}
    return DiskBaseline(**{**fields, "machine": machine}, expected=cold)


def cell_with_device(h: Host) -> tuple[Cell, Baseline]:
    """An open cell with that machine."""
    cell, saved = Cell("c1", h.shop), with_device(h)
    cell.open()
    cell.restore_all([saved], lambda _p: None)
    return cell, saved


def only_one_has_the_device(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libvirt: a second machine with a device in use does not start. A machine's end takes a moment."""
    start, destroy = h.libvirt.start, h.libvirt.destroy

    def exclusive(xml: str, *, paused: bool) -> None:
        if "<hostdev" in xml and h.libvirt.domains:
            raise LabError("PCI device 0000:01:00.0 is in use by driver QEMU")
        start(xml, paused=paused)

    def slowly(name: str) -> None:
        time.sleep(0.2)
        destroy(name)

    monkeypatch.setattr(h.libvirt, "start", exclusive)
    monkeypatch.setattr(h.libvirt, "destroy", slowly)


def test_a_machine_with_a_device_is_gone_before_the_next_one_starts(
    h: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_one_has_the_device(h, monkeypatch)
    cell, saved = cell_with_device(h)
    first = cell.machine("target-1")
    assert cell.reset([saved], lambda _p: None)[0].proof.proved
    assert first.state is DomainState.GONE
    h.unproved = {"target-1"}
    with pytest.raises(ResetError, match="withheld"):  # its replacement has the device in its turn
        cell.reset([saved], lambda _p: None)
    cell.close()
    assert h.left == []


def test_a_machine_that_withstands_keeps_its_device_and_that_is_told(
    h: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_one_has_the_device(h, monkeypatch)
    cell, saved = cell_with_device(h)
    h.libvirt.refuse = {"destroy"}
    for _ in range(2):
        with pytest.raises(LabError, match=r"still holds the devices of target-1: 0000:01:00\.0"):
            cell.reset([saved], lambda _p: None)
    h.libvirt.refuse = set()
    assert cell.reset([saved], lambda _p: None)[0].proof.proved, "its end is tried again"
    cell.close()
    assert h.left == []


def test_what_is_left_of_a_machine_that_is_gone_keeps_no_device(
    h: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_one_has_the_device(h, monkeypatch)
    cell, saved = cell_with_device(h)
    remove, failing = Incarnation.remove_folder, [True]

    def no_space(machine: Incarnation) -> None:
        if failing:
            raise OSError(28, "no space left")
        remove(machine)

    monkeypatch.setattr(Incarnation, "remove_folder", no_space)
    assert cell.reset([saved], lambda _p: None)[0].proof.proved
    failing.clear()
    cell.close()
    assert h.left == []


def test_a_host_with_other_firmware_says_so_before_a_machine_is_lost(h: Host) -> None:
    cell, saved = cell_with_device(h)
    first = cell.machine("target-1")
    h.uefi.variables.write_bytes(b"variables of the other kind of firmware")
    with pytest.raises(PrerequisiteError, match="other UEFI firmware"):
        cell.reset([saved], lambda _p: None)
    assert cell.machine("target-1") is first
    assert first.state is DomainState.RUNNING
    cell.close()
