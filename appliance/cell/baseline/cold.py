"""A machine booted anew from the disk of a ``disk`` baseline, and the proof that it is one.

The way of machines with passed-through devices, whose state cannot be saved; any other machine can have it. What
UEFI firmware remembers (variables, boot entries) outlives a boot, so a machine gets it from the baseline too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from appliance.cell.baseline.kinds import DISK, NVRAM, RAM, Baseline, ColdExpected, DiskBaseline
from appliance.cell.baseline.record import check_files
from appliance.cell.baseline.template import AGENT_LIMIT_S
from appliance.cell.baseline.workshop import Workshop
from appliance.cell.incarnation import Incarnation
from appliance.cell.proof import Check, GuestFacts, Proof, disk_checks, guest_facts, reseeded
from appliance.errors import GuestChannelError, GuestTamperError, LabError
from appliance.host.firmware import require_same_kind
from appliance.model import Firmware, printable


def require_bootable(baseline: Baseline) -> None:
    """Refuse a machine that needs firmware which this host has not. Cheap: for before anything is taken apart.

    Raises:
        PrerequisiteError: there is no UEFI firmware, or not the kind that it was saved with.
    """
    if baseline.machine.firmware is Firmware.UEFI:
        fact = baseline.files.get(NVRAM)
        require_same_kind(fact.size if fact else 0, baseline.id)


def boot(shop: Workshop, baseline: DiskBaseline, cell: str) -> Incarnation:
    """A machine on a new overlay of the baseline's disk: booting, unplugged, not yet proved.

    Raises:
        ResetError: the baseline's files changed.
        LabError: libvirt or QEMU refused.
    """
    check_files(baseline)
    nvram = baseline.path(NVRAM) if baseline.machine.firmware is Firmware.UEFI else None
    clone = shop.prepare(
        baseline.machine, cell, backing=baseline.path(DISK), nvram=nvram, ram=None, incoming=False
    )
    with clone.destroyed_on_error():
        clone.start()
        clone.resume()
    return clone


def prove_cold(clone: Incarnation, baseline: DiskBaseline, began: float) -> Proof:
    """Hold a booted, unplugged machine against its baseline; plants the new incarnation's sentinels.

    ``began`` is the monotonic time of the request. A guest that does not answer or answers nonsense is a
    failed check, so the caller withholds the machine.
    """
    checks = [
        *disk_checks(clone, baseline.expected.chain),
        *_nvram_checks(clone, baseline),
        _no_saved_ram(clone.pid),
    ]
    try:
        clone.wait_for_agent(AGENT_LIMIT_S)
        checks += cold_checks(guest_facts(clone.qga, clone.id), baseline.expected)
    except (GuestChannelError, GuestTamperError, LabError) as e:
        found = printable(str(e), 300)
        checks.append(Check(name="guest answers", passed=False, expected="its facts", found=found))
    return Proof(
        machine=clone.name, incarnation=clone.id, baseline=baseline.id,
        seconds=time.monotonic() - began, checks=tuple(checks),
    )  # fmt: skip


def cold_checks(facts: GuestFacts, expected: ColdExpected) -> Iterator[Check]:
    """The guest's half of a proof. Pure."""
    yield Check(
        name="boot id is a new one",
        passed=bool(facts.boot_id) and facts.boot_id != expected.boot_id,
        expected=f"another than {expected.boot_id}",
        found=printable(facts.boot_id, 300),
    )
    for name, found in (
        ("RAM holds no nonce of an earlier boot", facts.nonce),
        ("no RAM sentinel of an earlier run", facts.ram_sentinel),
        ("no disk sentinel of an earlier run", facts.disk_sentinel),
    ):
        yield Check(name=name, passed=not found, expected="", found=printable(found, 300))
    yield reseeded(facts)


def _nvram_checks(clone: Incarnation, baseline: DiskBaseline) -> Iterator[Check]:
    """What the firmware started with was a copy of the baseline's; nothing to check without UEFI."""
    if baseline.machine.firmware is Firmware.UEFI:
        fact, found = baseline.files.get(NVRAM), clone.nvram_sha256
        saved = fact.sha256 if fact else "none was saved"
        yield Check(name="NVRAM was the baseline's", passed=found == saved, expected=saved, found=found)


def _no_saved_ram(pid: int | None) -> Check:
    """The host's word for it: this QEMU maps no RAM file of any baseline."""
    try:
        mapped = Path(f"/proc/{pid}/maps").read_text().splitlines()
        found = [line.split(maxsplit=5)[5] for line in mapped if line.endswith(f"/{RAM}")]
    except OSError:
        found = ["no process"]
    name = "no baseline RAM is mapped"
    return Check(name=name, passed=not found, expected="", found=printable(" ".join(sorted(set(found))), 300))
