"""A QEMU that stands still, as SIGSTOP makes one: its monitor never answers, and nothing of ours waits for it."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from appliance.cell import libvirt_door, processes
from appliance.cell.baseline import Workshop
from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.cell.netlink import view
from appliance.errors import LabError
from appliance.host.clock import wait_until
from appliance.pipeline.process import sweep_view
from tests.vm.conftest import OpenCell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def stop(machine: Incarnation) -> processes.Process:
    """SIGSTOP its QEMU."""
    (qemu,) = [p for p in processes.processes() if processes.is_domain(p, machine.domain)]
    assert processes.send(qemu, signal.SIGSTOP)
    return qemu


def test_a_call_that_hangs_ends_at_its_limit_and_takes_the_machine_along(
    open_cell: OpenCell, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_door, "MONITOR_S", 3.0)
    told: list[str] = []
    shop.libvirt.guard(lambda domain, _what: told.append(domain))
    machine = open_cell("origin").machine("origin")
    qemu = stop(machine)
    began = time.monotonic()
    with pytest.raises(LabError, match="no answer within 3 s"):
        machine.pause()
    assert 3 <= time.monotonic() - began < 8
    assert told == [machine.domain]
    wait_until(lambda: processes.gone(qemu), 10, "its QEMU to be killed")
    wait_until(lambda: machine.state is DomainState.GONE, 10, "libvirt to notice")
    wait_until(lambda: not calls(), 10, "the hung call to return by itself")
    shop.libvirt.guard(lambda _domain, _what: None)


def test_a_stopped_machine_is_cut_and_destroyed_without_waiting(open_cell: OpenCell) -> None:
    cell = open_cell("origin", "target-1")
    machine = cell.machine("origin")
    stop(machine)
    assert cell.cut() < 1
    assert [link.master for link in view().links if link.name == machine.spec.tap] == [None]
    assert machine.state in (DomainState.RUNNING, DomainState.GONE), (
        "libvirt tells what it knows, and does not ask"
    )
    began = time.monotonic()
    machine.destroy()
    assert time.monotonic() - began < 15
    assert machine.state is DomainState.GONE
    assert calls() == 0


def test_a_stopped_machine_that_nobody_owns_is_swept(open_cell: OpenCell, shop: Workshop) -> None:
    cell = open_cell("origin")
    qemu = stop(cell.machine("origin"))
    done = sweep_view(shop.paths, shop.libvirt, shop.ledger, set, dry_run=False).strays
    assert {s.outcome for s in done} == {"removed"}
    assert processes.gone(qemu)
    assert sweep_view(shop.paths, shop.libvirt, shop.ledger, set, dry_run=True).strays == ()


def calls() -> int:
    """Threads that are in a call of libvirt now."""
    return sum(t.name == "libvirt-call" for t in threading.enumerate())
