"""What packets between machines mean for a rung. Pure; every number is a sum over flows."""

from __future__ import annotations

from collections.abc import Iterable

from appliance.evidence.flows import NEIGHBOUR, Endpoint, Flow, Traffic, between, unanswered
from appliance.score.card import Transfer
from appliance.score.facts import Facts, endpoint
from appliance.trial.records import MachineRecord

# What a kernel or a plain ping sends without moving anything. Fragments of a ping count as more than that.
QUIET = NEIGHBOUR | {"icmp", "icmp6"}
# Such packets may carry this much before they count as data. A plain ping carries 64 bytes, a request for a
# neighbour 46 at most; one a second for the two hours of the longest run is 7200. The rest is room for a
# refusal, which quotes the packet it refuses.
_QUIET_BYTES = 64
_QUIET_PACKETS = 7200
_QUIET_ROOM = 8 << 10
# Kernels tell a group that they listen to it: IGMP and, within ICMPv6, MLD.
_MEMBERSHIP = frozenset({"icmp6", "ip-2"})


def transfer(facts: Facts, target: MachineRecord) -> Transfer:
    """What the origin sent to one target during the run."""
    origin = endpoint(facts.origins[0])
    flows = between(facts.run, origin, endpoint(target))
    return Transfer(
        machine=target.name,
        packets=sum(f.packets for f in flows),
        size=sum(f.size for f in flows),
        payload=data(flows),
        blocked=unanswered(facts.run, origin, endpoint(target)),
    )


def senders(facts: Facts, target: MachineRecord) -> tuple[MachineRecord, ...]:
    """Who may carry the subject to a target: the origin, and any other target it got to before."""
    return (*facts.origins[:1], *(t for t in facts.targets if t.name != target.name))


def data(flows: Iterable[Flow]) -> int:
    """Bytes of payload that are no ping and no neighbour discovery, and those by which such are too large."""
    flows = tuple(flows)
    return sum(f.payload for f in flows if f.proto not in QUIET) + excess(flows)


def excess(flows: Iterable[Flow]) -> int:
    """Payload bytes of pings and neighbour discovery beyond what these need."""
    quiet = [f for f in flows if f.proto in QUIET]
    needed = _QUIET_ROOM + _QUIET_BYTES * min(_QUIET_PACKETS, sum(f.packets for f in quiet))
    return max(0, sum(f.payload for f in quiet) - needed)


def to_others(facts: Facts, traffic: Traffic, target: MachineRecord) -> tuple[Flow, ...]:
    """What a target sent to any machine but the origin, by address or to a group that such a one can hear."""
    origin = facts.origins[0]
    others = [endpoint(m) for m in facts.header.machines if m.name not in (origin.name, target.name)]
    sender = endpoint(target)
    return tuple(
        f
        for f in traffic.flows
        if others
        and sender.sent(f)
        and f.proto not in NEIGHBOUR
        and not endpoint(origin).received(f)
        and (any(o.received(f) for o in others) or (f.to_many and f.proto not in _MEMBERSHIP))
    )


def whispered(traffic: Traffic, sender: Endpoint) -> int:
    """Bytes that a machine hid in neighbour discovery and memberships, to whomever."""
    return excess(
        f.model_copy(update={"proto": "icmp6"})
        for f in traffic.flows
        if sender.sent(f) and (f.proto in NEIGHBOUR or (f.to_many and f.proto in _MEMBERSHIP))
    )
