"""A clone of a baseline, and the proof that it is one."""

from __future__ import annotations

import time

from appliance.cell import migration
from appliance.cell.baseline.cold import boot, prove_cold
from appliance.cell.baseline.kinds import DISK, RAM, STATE, Baseline, DiskBaseline, RamBaseline
from appliance.cell.baseline.record import check_files
from appliance.cell.baseline.workshop import Workshop
from appliance.cell.incarnation import Incarnation
from appliance.cell.proof import (
    SCRIPT_SHA256,
    Proof,
    ask_waiting,
    guest_checks,
    guest_facts,
    host_checks,
    require_clock_set,
    tell_time,
    waiting_facts,
)
from appliance.cell.proof import Check as ProofCheck
from appliance.errors import GuestChannelError, GuestTamperError, LabError
from appliance.model import printable

_WAKE_S = 10
_LATE_S = 0.5


def restore(shop: Workshop, baseline: Baseline, cell: str) -> Incarnation:
    """A clone of a baseline, or a machine that boots from it: running, unplugged, not yet proved.

    Raises:
        ResetError: the baseline's files changed.
        LabError: libvirt or QEMU refused.
    """
    if isinstance(baseline, DiskBaseline):
        return boot(shop, baseline, cell)
    check_files(baseline)
    clone = shop.prepare(
        baseline.machine, cell, backing=baseline.path(DISK), ram=baseline.path(RAM), incoming=True
    )
    with clone.destroyed_on_error():
        clone.start()
        clone.open_port()  # open as it was when the state was saved, or the script's wait ends
        migration.load_state(clone, baseline.path(STATE))
        clone.resume()
    return clone


def prove(clone: Incarnation, baseline: Baseline, began: float, *, will_stand_by: bool = False) -> Proof:
    """Hold a restored, unplugged machine against its baseline; plants the new incarnation's sentinels.

    ``began`` is the monotonic time of the request. A guest that does not answer or answers nonsense is a
    failed check, so the caller withholds the machine. One that ``will_stand_by`` is to have its clock set
    again, by :func:`wake`.
    """
    if isinstance(baseline, DiskBaseline):
        return prove_cold(clone, baseline, began)
    checks: list[ProofCheck] = []
    try:
        waits = _waits(baseline)
        if waits:
            ask_waiting(clone.open_port(), clone.id, stay=will_stand_by)
        clone.wait_for_agent(30)
        checks += host_checks(clone, baseline.expected)  # while the guest works on its answer
        facts = waiting_facts(clone.open_port()) if waits else guest_facts(clone.qga, clone.id)
        checks += guest_checks(facts, baseline.expected)
    except (GuestChannelError, GuestTamperError, LabError) as e:
        checks.append(
            ProofCheck(name="guest answers", passed=False, expected="its facts", found=printable(str(e), 300))
        )
    finally:
        if not will_stand_by:
            clone.hang_up()
    return Proof(
        machine=clone.name, incarnation=clone.id, baseline=baseline.id,
        seconds=time.monotonic() - began, checks=tuple(checks),
    )  # fmt: skip


def wake(machine: Incarnation, baseline: Baseline) -> float:
    """Let a machine run that stood by since it was proved, and set its clock.

    Returns the monotonic time at which its agent answered; its clock was set a little before or after that.

    Raises:
        GuestChannelError: the guest does not answer.
        GuestTamperError: it answers what our script does not say.
        LabError: libvirt or QEMU refused.
    """
    machine.resume()
    began = time.monotonic()
    try:
        told = tell_time(machine.open_port()) if _waits(baseline) else ""  # done while the agent is asked
        if not machine.qga.ping(_WAKE_S):
            raise GuestChannelError(f"{machine.name} of {machine.cell} does not answer after it stood by")
        answered = time.monotonic()
        if told:
            require_clock_set(machine.open_port(), told)
        if not told or time.monotonic() - began > _LATE_S:  # what it was told may lie as far back
            machine.qga.set_time(time.time())
    finally:
        machine.hang_up()
    return answered


def _waits(baseline: Baseline) -> bool:
    """True if this version of our script waits in the baseline's machines."""
    return isinstance(baseline, RamBaseline) and baseline.expected.script == SCRIPT_SHA256
