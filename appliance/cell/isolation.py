"""Two independent looks at the seal: the hypervisor's, and the one from inside a guest.

A guest's negative probe counts only beside a positive twin on the same path, and the result has three
values: ``held``, ``leaked``, ``unverified``. "Could not test" is never "held".
"""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from appliance.cell import netlink
from appliance.cell.incarnation import Incarnation
from appliance.cell.netlink import Link, NamespaceView
from appliance.errors import GuestChannelError, GuestTamperError, LabError, SealError
from appliance.model import Frozen, Role, printable

# Addresses of RFC 5737 and RFC 3849 stand for "anywhere else"; the others are cloud metadata services
# (RFC 3927 link-local, and the two that lie outside of it).
OUTSIDE4 = "192.0.2.1"
OUTSIDE6 = "2001:db8::1"
METADATA = ("169.254.169.254", "100.100.100.200", "168.63.129.16")
_SCRIPT = files("appliance.cell.guest").joinpath("paths.py").read_text()
_LIMIT_S = 90.0


class SealFact(Frozen):
    """One thing the hypervisor's own view must show."""

    name: str
    passed: bool
    found: str


class PathResult(Frozen):
    """One way out, tried from inside a machine. Same fields as the trial's record of it."""

    machine: str
    name: str
    outcome: Literal["held", "leaked", "unverified"]
    negative: str
    positive: str


class _Reply(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    results: Annotated[
        dict[
            Annotated[str, StringConstraints(max_length=40)],
            Annotated[str, StringConstraints(max_length=200)],
        ],
        Field(max_length=40),
    ]


def namespace_facts(view: NamespaceView, bridges: set[str], taps: set[str]) -> list[SealFact]:
    """What a sealed namespace consists of: loopback, our bridges, our taps, and nothing else. Pure."""
    strangers = [x for x in view.links if not _known(x, bridges, taps)]
    return [
        SealFact(
            name="only loopback, cell bridges with their anchors, and machine taps exist",
            passed=not strangers,
            found=str(
                [f"{x.name} ({x.kind})" for x in strangers] or f"{len(view.links)} interfaces, all known"
            ),
        ),
        SealFact(
            name="the host has no address on any segment",
            passed=not view.addresses,
            found=str(list(view.addresses) or "none"),
        ),
        SealFact(
            name="there is no route", passed=not _real_routes(view), found=str(_real_routes(view) or "none")
        ),
    ]


def _known(link: Link, bridges: set[str], taps: set[str]) -> bool:
    return (
        link.kind == "loopback"
        or (link.kind == "bridge" and link.name in bridges)
        or (link.kind == "tun" and link.name in taps)
    )


def _real_routes(view: NamespaceView) -> list[str]:
    """Routes that lead somewhere; an IPv6 multicast entry of an interface without addresses does not."""
    return [r for r in view.routes if not r.startswith("ff00::")]


def hypervisor_facts(machine: Incarnation, host_namespace: int) -> list[SealFact]:
    """What QEMU itself says of a machine's network, and where its process lives.

    Raises:
        LabError: its process is gone, or QEMU does not answer.
    """
    netdevs = [line.strip() for line in machine.hmp("info network").splitlines() if line.strip()]
    # libvirt hands the tap over as a descriptor, so the back end reads "type=tap,fd=..".
    backends = [x for x in netdevs if x.startswith("\\ ") or "type=" in x]
    others = [x for x in backends if "type=nic" not in x and "type=tap" not in x]
    inode = _namespace_of(machine)
    sealed = netlink.namespace_inode()
    return [
        SealFact(
            name=f"{machine.name}: QEMU's only network back end is one tap",
            passed=not others and sum("type=tap" in x for x in backends) == 1,
            found=printable("; ".join(netdevs), 400),
        ),
        SealFact(
            name=f"{machine.name}: QEMU lives in the sealed namespace",
            passed=inode == sealed != host_namespace,
            found=f"its namespace {inode}, sealed {sealed}, host {host_namespace}",
        ),
    ]


def _namespace_of(machine: Incarnation) -> int:
    """Inode of the network namespace that a machine's process lives in; 0 if it has no process.

    Raises:
        LabError: the process is gone.
    """
    pid = machine.pid
    if not pid:
        return 0
    try:
        return netlink.namespace_inode(pid)
    except OSError as e:
        raise LabError(f"{machine.name}: its process {pid} cannot be looked at: {e.strerror or e}") from e


def require_sealed(facts: Sequence[SealFact]) -> None:
    """Raise if any fact does not hold.

    Raises:
        SealError: names each fact that failed.
    """
    broken = [f"{f.name}: {f.found}" for f in facts if not f.passed]
    if broken or not facts:
        raise SealError("the cell is not sealed: " + ("; ".join(broken) or "nothing was examined"))


def guest_paths(machine: Incarnation, peers: Sequence[Incarnation]) -> list[PathResult]:
    """Try every way out from inside a machine. ``peers`` are the plugged machines that give the twins.

    Raises:
        GuestTamperError: the script's answer is not what our script prints.
        GuestChannelError: the guest does not answer.
    """
    spec = machine.spec.machine
    world = next((p for p in (spec, *(p.spec.machine for p in peers)) if p.role is Role.WORLD), None)
    question = {
        "peers": [p.spec.machine.address for p in peers],
        "peers6": [p.spec.machine.address6 for p in peers],
        "outside4": OUTSIDE4,
        "outside6": OUTSIDE6,
        "metadata": list(METADATA),
        "segment": spec.address.rsplit(".", 1)[0],
    }
    done = machine.qga.python(_SCRIPT, json.dumps(question), timeout_s=_LIMIT_S)
    try:
        reply = _Reply.model_validate_json(done.stdout)
    except ValidationError as e:
        detail = printable(done.stderr.decode(errors="replace"), 300)
        raise GuestTamperError(f"path script on {machine.name}: exit status {done.rc}; {detail}") from e
    return judge(spec.name, reply.results, world.address if world else None)


_RESOLVER = "dns name through the resolver"
# name of the way out -> (key of the negative, key of its twin)
_TWINS = {
    "ipv4 to elsewhere": ("tcp4-outside", "tcp4-peer"),
    "ipv6 to elsewhere": ("tcp6-outside", "tcp6-peer"),
    "metadata 169.254.169.254": ("tcp4-metadata-0", "tcp4-peer"),
    "metadata 100.100.100.200": ("tcp4-metadata-1", "tcp4-peer"),
    "metadata 168.63.129.16": ("tcp4-metadata-2", "tcp4-peer"),
    "dns to elsewhere": ("udp-outside", "udp-peer"),
    _RESOLVER: ("resolve-outside", "udp-peer"),
    "strangers on the segment, arp": ("arp-strangers", "arp-peers"),
    "strangers on the link, ipv6 multicast": ("nd-strangers", "nd-peers"),
}
# What a negative probe may say when the way is shut. Anything else (open, refused, an answer) came from
# somebody who should not be there.
_SHUT = ("timeout", "unreachable", "none")
_WORKS = ("open", "refused", "answered")


def judge(machine: str, results: dict[str, str], world: str | None = None) -> list[PathResult]:
    """Three-valued outcomes from the raw results of both halves. Pure.

    A result that is missing or not a known word makes its way out ``unverified``. ``world`` is the address of
    the cell's world machine, which resolves every name to itself: its answer, and no other beside it, is not
    one from outside.
    """
    judged = []
    for name, (negative_key, positive_key) in _TWINS.items():
        negative, positive = results.get(negative_key, "missing"), results.get(positive_key, "missing")
        by_world = name == _RESOLVER and world is not None and negative == f"answered by {world}"
        shut = by_world or negative.split(" ")[0] in _SHUT
        works = positive.split(" ")[0] in _WORKS
        known = shut or negative.split(" ")[0] in _WORKS
        outcome: Literal["held", "leaked", "unverified"]
        if known and not shut:
            outcome = "leaked"
        elif shut and works:
            outcome = "held"
        else:
            outcome = "unverified"
        judged.append(
            PathResult(
                machine=machine,
                name=name,
                outcome=outcome,
                negative=printable(negative, 200),
                positive=printable(positive, 200),
            )
        )
    return judged


def paths_from_all(machines: Sequence[Incarnation]) -> list[PathResult]:
    """Every way out from every machine, side by side; all ways of a silent one are unverified."""

    def one(machine: Incarnation) -> list[PathResult]:
        peers = [m for m in machines if m is not machine and m.plugged]
        try:
            return guest_paths(machine, peers)
        except (GuestChannelError, GuestTamperError) as e:
            return [
                r.model_copy(update={"negative": printable(str(e), 200)}) for r in judge(machine.name, {})
            ]

    with concurrent.futures.ThreadPoolExecutor(max(1, len(machines))) as pool:
        return [result for results in pool.map(one, machines) for result in results]
