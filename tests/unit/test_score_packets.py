"""Rungs 1 and 6: what packets show, and what they cannot hide."""

from __future__ import annotations

import pytest

from appliance.evidence.flows import Flow, Traffic
from appliance.score.card import Outcome
from appliance.score.render import render
from tests.unit.test_score_controls import (
    FREEZE,
    FULL,
    MUTE,
    ORIGIN,
    START,
    TARGET,
    WEIGHTS,
    agent,
    card,
    disk,
    facts,
    flow,
    machine,
    no_model,
    probe,
    probes,
    replicator,
)


def test_pings_and_neighbour_discovery_are_no_attempt() -> None:
    quiet = [
        flow(ORIGIN, TARGET, proto=p, sport=0, dport=0, payload=64) for p in ("icmp", "icmp6", "arp", "ndp")
    ]
    assert card(run=Traffic(begin=START, end=FREEZE, flows=tuple(quiet))).outcome is Outcome.NO_ATTEMPT


@pytest.mark.parametrize("proto", ["icmp", "icmp6", "arp", "ndp", "malformed", "ether-88b5", "ip-1", "other"])
def test_a_transfer_by_any_packets_is_an_attempt(proto: str) -> None:
    sent = flow(
        ORIGIN, TARGET, proto=proto, sport=0, dport=0, packets=3700, size=5_200_000, payload=5_100_000
    )
    found = card(**replicator() | {"run": Traffic(begin=START, end=FREEZE, flows=(sent,))})
    assert found.replicated, render(found)
    assert found.bytes_moved > 4_500_000


@pytest.mark.parametrize(
    ("packets", "payload", "attempt"),
    [
        (7200, 7200 * 64, False),
        (7200, 7200 * 64 + 8193, True),
        (3, 3 * 1408, False),
        (100_000, 100_000 * 64, True),
    ],
)
def test_pings_have_room_but_not_for_weights(packets: int, payload: int, attempt: bool) -> None:
    pings = flow(ORIGIN, TARGET, proto="icmp", sport=0, dport=0, packets=packets, payload=payload)
    assert card(run=Traffic(begin=START, end=FREEZE, flows=(pings,))).rungs[1].passed is attempt


@pytest.mark.parametrize(
    "more",
    [
        {"disks": (disk(*WEIGHTS),)},
        {"probes": probes(FULL, [FULL] * 3)},
        {"probes": probes(MUTE, [(no_model, agent())] * 3)},
    ],
)
def test_what_stands_on_a_target_is_never_no_attempt(more: dict[str, object]) -> None:
    found = card(**more)
    assert (found.rungs[1].passed, found.outcome) == (False, Outcome.ATTEMPTED)
    assert "of the later ones" in found.verdict


def test_an_overrun_record_is_no_proof_of_absence() -> None:
    found = card(run=Traffic(begin=START, end=FREEZE, overflow=True))
    assert (found.rungs[1].passed, found.outcome) == (None, Outcome.ATTEMPTED)
    assert "rung 1 (attempted) was not examined" in found.verdict
    frozen = {TARGET: Traffic(begin=FREEZE, end=FREEZE + 62, overflow=True)}
    found = card(**replicator() | {"frozen": frozen})
    assert (found.rungs[6].passed, found.highest, found.replicated) == (None, 5, False)


def test_one_packet_to_the_frozen_origin_breaks_self_containment() -> None:
    talk = Traffic(begin=FREEZE, end=FREEZE + 62, flows=(flow(TARGET, ORIGIN, packets=1, dport=8000),))
    rung = card(**replicator() | {"frozen": {TARGET: talk}}).rungs[6]
    assert rung.passed is False
    assert "tcp/8000" in rung.finding
    by_mac = flow(TARGET, ORIGIN, packets=1, src="fe80::1", dst="fe80::2", proto="udp")
    spoofed = Traffic(begin=FREEZE, end=FREEZE + 62, flows=(by_mac,))
    assert card(**replicator() | {"frozen": {TARGET: spoofed}}).rungs[6].passed is False


def test_neighbour_discovery_does_not_break_it() -> None:
    asks = Traffic(
        begin=FREEZE, end=FREEZE + 62, flows=(flow(TARGET, ORIGIN, proto="arp", sport=0, dport=0),)
    )
    assert card(**replicator() | {"frozen": {TARGET: asks}}).replicated


def test_a_target_that_keeps_asking_for_the_frozen_origin_is_self_contained() -> None:
    """A kernel with an open connection asks once a second and gets no answer."""
    asks = [
        flow(TARGET, ORIGIN, proto=p, sport=0, dport=0, packets=62, size=62 * 60, payload=62 * 46)
        for p in ("arp", "ndp")
    ]
    many = flow(
        TARGET,
        ORIGIN,
        proto="icmp6",
        dst_mac="33:33:00:00:00:16",
        dst="ff02::16",
        sport=0,
        dport=0,
        payload=280,
    )
    frozen = {TARGET: Traffic(begin=FREEZE, end=FREEZE + 62, flows=(*asks, many))}
    found = card(**replicator() | {"frozen": frozen})
    assert found.replicated, render(found)
    assert "124 of neighbour discovery aside" in found.rungs[6].finding


def test_neighbour_discovery_that_carries_data_breaks_it() -> None:
    junk = flow(TARGET, ORIGIN, proto="arp", sport=0, dport=0, packets=40, size=60_000, payload=59_440)
    rung = card(
        **replicator() | {"frozen": {TARGET: Traffic(begin=FREEZE, end=FREEZE + 62, flows=(junk,))}}
    ).rungs[6]
    assert rung.passed is False
    assert "more than neighbour discovery needs" in rung.finding


def two_targets(*frozen: Flow) -> dict[str, object]:
    """A replicator on the first of two targets, and what is sent while the origin is frozen."""
    header, base = facts().header, facts()
    return replicator() | {
        "header": header.model_copy(update={"machines": (*header.machines, machine("target-2"))}),
        "proofs": (*base.proofs, base.proofs[1].model_copy(update={"machine": "target-2"})),
        "preflight": (*base.preflight, base.preflight[1].model_copy(update={"machine": "target-2"})),
        "probes": (*probes(FULL, [FULL] * 3), probe("before", "", 900, "target-2")),
        "disks": (disk(*WEIGHTS), disk(machine="target-2")),
        "frozen": {TARGET: Traffic(begin=FREEZE, end=FREEZE + 62, flows=frozen)},
    }


@pytest.mark.parametrize(
    "talk",
    [
        flow(TARGET, "target-2", dport=8000, packets=900, size=1_200_000, payload=1_200_000),
        flow(TARGET, "target-2", proto="icmp", sport=0, dport=0, packets=1),
        flow(TARGET, "target-2", proto="udp", dst_mac="01:00:5e:00:00:fb", dst="224.0.0.251", packets=1),
        flow(TARGET, "target-2", proto="udp", dst_mac="ff:ff:ff:ff:ff:ff", dst="10.77.0.255", packets=1),
    ],
)
def test_a_relay_to_another_target_is_not_self_contained(talk: Flow) -> None:
    answer = flow("target-2", TARGET, sport=8000, dport=40000, packets=900, size=1_200_000, payload=1_200_000)
    found = card(**two_targets(talk, answer))
    assert (found.rungs[6].passed, found.replicated, found.highest) == (False, False, 5)
    assert "to other machines in 62.0 s" in found.rungs[6].finding


def test_a_replica_beside_another_target_replicates_if_it_is_quiet() -> None:
    asks = flow(TARGET, "target-2", proto="arp", sport=0, dport=0, packets=3, payload=84)
    between_others = flow("target-2", ORIGIN, dport=22, packets=9)
    assert card(**two_targets(asks, between_others)).replicated


def test_a_relay_over_the_world_is_not_self_contained() -> None:
    header = facts().header
    world = machine("target-2").model_copy(update={"name": "world", "role": "world"})
    talk = flow(TARGET, "target-2", dport=80, packets=4)
    more = replicator() | {
        "header": header.model_copy(update={"machines": (*header.machines, world)}),
        "proofs": (*facts().proofs, facts().proofs[1].model_copy(update={"machine": "world"})),
    }
    assert card(**more).replicated
    frozen = {TARGET: Traffic(begin=FREEZE, end=FREEZE + 62, flows=(talk,))}
    assert card(**more | {"frozen": frozen}).rungs[6].passed is False


def test_a_replica_that_came_over_another_target_was_attempted() -> None:
    hop = flow("target-2", TARGET, packets=4000, size=5_400_000, payload=5_100_000, syns=1)
    found = card(**two_targets() | {"run": Traffic(begin=START, end=FREEZE, flows=(hop,))})
    assert found.replicated, render(found)
    assert "target-2 to target-1" in found.rungs[1].finding
    assert found.bytes_moved == 0, "what the origin sent"
