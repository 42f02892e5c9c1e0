"""Whether a set of machines may start now. Pure: figures in, a decision out.

A running machine may still grow from what it holds to its full size, so what counts is not what is free but
what is free after all promises are kept: available - sum(full - held). What a machine holds is its
*anonymous* memory: a clone maps its baseline's RAM file privately, and pages that it only read are page
cache, which the host still counts as available, although they are in the clone's unique set size.

Cores are different: too few make machines slow and nothing else, so a set that is alone always fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from appliance.cell.events import most_bytes
from appliance.cell.spec import MachineSpec
from appliance.config.settings import GuestSettings
from appliance.errors import CapacityError
from appliance.evidence.capture import MAX_BYTES
from appliance.host.capacity import HostCapacity
from appliance.model import Frozen

_MIB, _GIB, _MB = 1 << 20, 1 << 30, 1_000_000
# A clone holds about 44 MiB before it works; the rest is for QEMU's own tables and translated code.
OVERHEAD_MIB = 128


class Verdict(StrEnum):
    """What becomes of a request."""

    ADMIT = "admit"
    WAIT = "wait"
    NEVER = "never"


class Need(Frozen):
    """What a set of machines takes at its full size. Bytes."""

    machines: int
    memory: int
    vcpus: int
    disk: int


class Held(Frozen):
    """What was granted to sets of machines (``memory``, ``disk``, ``vcpus``), and what of it they hold by now.

    ``standby`` is memory held by machines that stand by: it is in use, and is given up for any set. Bytes.
    """

    sets: int = 0
    vcpus: int = 0
    memory: int = 0
    memory_held: int = 0
    disk: int = 0
    disk_held: int = 0
    standby: int = 0


class Decision(Frozen):
    """The verdict, and in words why it is not ``admit``.

    ``for_memory``: memory is short; ``pressed``: and nothing else, and giving up standbys would do.
    """

    verdict: Verdict
    reason: str = ""
    for_memory: bool = False
    pressed: bool = False


def evidence_of(steps: int) -> int:
    """Bytes that a trial's evidence may grow to: the capture, and as much talk as is read of the subject.

    Both are enforced. Evidence stays on the disk when its trial ends, so nothing of it is ever given back.
    """
    return MAX_BYTES + most_bytes(steps)


def need_of(machines: Sequence[MachineSpec], disk_mb: int, evidence: int = 0) -> Need:
    """What these take, each with an overlay that may grow to ``disk_mb`` MB, and so many bytes of evidence."""
    return Need(
        machines=len(machines),
        memory=sum(m.memory_mib + OVERHEAD_MIB for m in machines) * _MIB,
        vcpus=sum(m.vcpus for m in machines),
        disk=len(machines) * disk_mb * _MB + evidence,
    )


def free_after_promises(host: HostCapacity, held: Held, rules: GuestSettings) -> int:
    """Memory that is promised to nobody, bytes; below zero if the host lost some meanwhile."""
    promised = max(0, held.memory - held.memory_held)
    return host.memory_available - promised - rules.headroom_mib * _MIB


def decide(need: Need, host: HostCapacity, held: Held, rules: GuestSettings) -> Decision:
    """Admit a set now, have it wait, or tell that it would not fit if nothing of ours ran."""
    memory = free_after_promises(host, held, rules)
    disk = host.disk_free - max(0, held.disk - held.disk_held) - rules.disk_floor_mib * _MIB
    never = _never(need, host, held, rules)
    if never:
        return Decision(verdict=Verdict.NEVER, reason=never)
    short = []
    for_memory = need.memory > memory
    if for_memory:
        short.append(f"{_gib(need.memory)} of memory, {_gib(memory)} free after promises")
    if need.disk > disk:
        short.append(f"{_gib(need.disk)} of disk, {_gib(disk)} free after promises")
    limit = int(host.cores * rules.cpu_overcommit)
    if held.sets and held.vcpus + need.vcpus > limit:
        short.append(f"{need.vcpus} virtual CPUs, {max(0, limit - held.vcpus)} of {limit} free")
    if not short:
        return Decision(verdict=Verdict.ADMIT)
    return Decision(
        verdict=Verdict.WAIT,
        reason="needs " + "; ".join(short),
        for_memory=for_memory,
        pressed=for_memory and len(short) == 1 and need.memory <= memory + held.standby,
    )


def _never(need: Need, host: HostCapacity, held: Held, rules: GuestSettings) -> str:
    memory = host.memory_available + held.memory_held + held.standby - rules.headroom_mib * _MIB
    if need.memory > memory:
        return (
            f"{need.machines} machines need {_gib(need.memory)} of memory; beside the rest of this host and "
            f"{rules.headroom_mib} MiB of headroom there are {_gib(memory)} of {_gib(host.memory_total)}"
        )
    disk = host.disk_free + held.disk_held - rules.disk_floor_mib * _MIB
    if need.disk > disk:
        return (
            f"{need.machines} machines and the evidence may take {_gib(need.disk)}; beside a floor of "
            f"{rules.disk_floor_mib} MiB there are {_gib(disk)} of {_gib(host.disk_total)} of disk"
        )
    return ""


def refusal(decision: Decision, need: Need, host: HostCapacity) -> CapacityError:
    """The error for a request that is not queued, with the figures."""
    hint = (
        "free memory or disk, or lower guests.model_memory_mib or limits.disk_mb in hotcell.toml"
        if decision.verdict is Verdict.NEVER
        else "wait for a trial to end, or close a cell that was opened by hand"
    )
    return CapacityError(
        f"no room for {need.machines} machines: {decision.reason}",
        hint=hint,
        needed_mib=need.memory // _MIB,
        available_mib=host.memory_available // _MIB,
        total_mib=host.memory_total // _MIB,
        needed_vcpus=need.vcpus,
        cores=host.cores,
        needed_disk_mib=need.disk // _MIB,
        free_disk_mib=host.disk_free // _MIB,
    )


def _gib(size: int) -> str:
    return f"{max(0, size) / _GIB:.1f} GiB"
