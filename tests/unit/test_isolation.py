"""Judging the seal: three-valued from inside, and nothing unknown tolerated from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2 import IPRoute

from appliance.cell import isolation, netlink
from appliance.cell.incarnation import Incarnation
from appliance.cell.isolation import (
    SealFact,
    guest_paths,
    hypervisor_facts,
    judge,
    namespace_facts,
    paths_from_all,
    require_sealed,
)
from appliance.cell.ledger import Ledger
from appliance.cell.netlink import Link, NamespaceView
from appliance.errors import GuestTamperError, LabError, SealError
from tests.fakes.machine import HELD, FakeLibvirt, FakeNet, incarnation
from tests.fakes.namespace import add_tap, in_namespace

WAYS = list(isolation._TWINS)


def outcome_of(negative: str, positive: str) -> str:
    first, (bad, good) = next(iter(isolation._TWINS.items()))
    return {r.name: r.outcome for r in judge("origin", HELD | {bad: negative, good: positive})}[first]


@pytest.mark.parametrize(
    ("negative", "positive", "outcome"),
    [
        ("timeout", "open", "held"),
        ("unreachable", "refused", "held"),
        ("none", "answered 2", "held"),
        ("timeout", "answered", "held"),
        # somebody answered who should not be there, whatever the twin says
        ("open", "open", "leaked"),
        ("refused", "open", "leaked"),
        ("answered by 10.77.0.99", "none", "leaked"),
        ("open", "timeout", "leaked"),
        # the twin failed: the tester may be what does not work
        ("timeout", "timeout", "unverified"),
        ("unreachable", "unreachable", "unverified"),
        ("none", "none", "unverified"),
        # no word that we know
        ("", "open", "unverified"),
        ("error OSError [Errno 1] not permitted", "open", "unverified"),
        ("held", "open", "unverified"),
        ("TIMEOUT", "open", "unverified"),
        ("timeouts", "open", "unverified"),
        ("timeout", "error", "unverified"),
        ("timeout", "opened", "unverified"),
    ],
)
def test_an_outcome_needs_both_halves(negative: str, positive: str, outcome: str) -> None:
    assert outcome_of(negative, positive) == outcome


@pytest.mark.parametrize("missing", list(HELD))
def test_a_missing_result_never_counts_as_held(missing: str) -> None:
    results = {k: v for k, v in HELD.items() if k != missing}
    touched = {r.name: r.outcome for r in judge("origin", results)}
    for name, keys in isolation._TWINS.items():
        assert touched[name] == ("unverified" if missing in keys else "held")


def test_nothing_at_all_is_unverified_for_every_way_out() -> None:
    assert [(r.name, r.outcome) for r in judge("origin", {})] == [(w, "unverified") for w in WAYS]


@given(st.dictionaries(st.sampled_from([*HELD, "other"]), st.text(max_size=40)))
def test_held_only_ever_with_known_words_on_both_sides(results: dict[str, str]) -> None:
    judged = judge("origin", results)
    assert [r.name for r in judged] == WAYS
    for r in judged:
        bad, good = isolation._TWINS[r.name]
        if r.outcome == "held":
            assert results[bad].split(" ")[0] in ("timeout", "unreachable", "none")
            assert results[good].split(" ")[0] in ("open", "refused", "answered")
        assert r.negative.isprintable()
        assert r.positive.isprintable()


def resolver(said: str, world: str | None, twin: str = "answered") -> str:
    negative, positive = isolation._TWINS[isolation._RESOLVER]
    judged = judge("origin", HELD | {negative: said, positive: twin}, world)
    others = {r.outcome for r in judged if negative not in isolation._TWINS[r.name]}
    assert others <= {"held", "unverified"}
    return next(r.outcome for r in judged if r.name == isolation._RESOLVER)


@pytest.mark.parametrize(
    ("said", "world", "twin", "outcome"),
    [
        ("answered by 10.77.0.1", "10.77.0.1", "answered", "held"),
        ("none", "10.77.0.1", "answered", "held"),
        # without a twin nothing was learned, whoever answered
        ("answered by 10.77.0.1", "10.77.0.1", "timeout", "unverified"),
        # there is no world, or it is not (only) the world that answers
        ("answered by 10.77.0.1", None, "answered", "leaked"),
        ("answered by 10.77.0.11", "10.77.0.1", "answered", "leaked"),
        ("answered by 10.77.0.1 192.0.2.53", "10.77.0.1", "answered", "leaked"),
        ("answered by 192.0.2.53 10.77.0.1", "10.77.0.1", "answered", "leaked"),
        ("answered by", "10.77.0.1", "answered", "leaked"),
        ("answered", "10.77.0.1", "answered", "leaked"),
    ],
)
def test_only_the_worlds_own_answer_is_no_leak(said: str, world: str | None, twin: str, outcome: str) -> None:
    assert resolver(said, world, twin) == outcome


@pytest.mark.parametrize("name", [w for w in WAYS if w != isolation._RESOLVER])
def test_the_worlds_answer_is_a_leak_on_every_other_way(name: str) -> None:
    judged = judge("origin", HELD | {isolation._TWINS[name][0]: "answered by 10.77.0.1"}, "10.77.0.1")
    assert {r.name for r in judged if r.outcome == "leaked"} == {name}


# -- the namespace -------------------------------------------------------------------------------------

LO = Link(1, "lo", "loopback", True, None)
BRIDGE = Link(2, "hcb1", "bridge", True, None)
TAP = Link(3, "hct1", "tun", True, 2)
ANCHOR = Link(4, "hca1", "tun", True, 2)


def broken(*links: Link, addresses: tuple[str, ...] = (), routes: tuple[str, ...] = ()) -> list[SealFact]:
    view = NamespaceView((LO, *links), addresses, routes)
    return [f for f in namespace_facts(view, {"hcb1"}, {"hct1", "hca1"}) if not f.passed]


def test_our_own_links_are_the_seal() -> None:
    assert broken() == []
    assert broken(BRIDGE, TAP, ANCHOR) == []


@pytest.mark.parametrize(
    "stranger",
    [
        Link(9, "eth0", "physical", False, None),
        Link(9, "veth0", "veth", True, None),
        Link(9, "eth0.7", "vlan", True, None),
        Link(9, "wg0", "wireguard", True, None),
        Link(9, "hcb2", "bridge", True, None),  # a bridge that no open cell has
        Link(9, "hct2", "tun", True, None),  # a tap that no open cell has
        Link(9, "hct1", "veth", True, 2),  # the name of a tap, and no tap
        Link(9, "hcb1", "tun", True, None),  # the name of a bridge, and no bridge
        Link(9, "hcb1", "vlan", True, None),
        Link(9, "lo2", "physical", True, None),
        Link(9, "dummy0", "dummy", False, None),
    ],
    ids=lambda x: f"{x.name}-{x.kind}",
)
def test_a_stranger_breaks_the_seal_up_or_down(stranger: Link) -> None:
    facts = broken(BRIDGE, TAP, stranger)
    assert len(facts) == 1
    assert stranger.name in facts[0].found


@pytest.mark.parametrize("address", ["192.0.2.7/24 dev 2", "fe80::1/64 dev 2", "10.77.0.254/24 dev 3"])
def test_an_address_on_a_segment_breaks_it(address: str) -> None:
    assert [f.name for f in broken(BRIDGE, addresses=(address,))] == [
        "the host has no address on any segment"
    ]


@pytest.mark.parametrize("route", ["default dev 2", "10.0.0.0 dev 2", "fe80:: dev 2", "2001:db8:: dev 3"])
def test_a_route_breaks_it(route: str) -> None:
    assert [f.name for f in broken(BRIDGE, routes=(route,))] == ["there is no route"]


def test_the_multicast_entry_of_an_addressless_link_leads_nowhere() -> None:
    assert broken(BRIDGE, routes=("ff00:: dev 2",)) == []


def test_no_facts_are_no_seal() -> None:
    with pytest.raises(SealError, match="nothing was examined"):
        require_sealed([])


def test_the_error_names_every_fact_that_fails() -> None:
    with pytest.raises(SealError, match=r"first: 1; second: 2"):
        require_sealed(
            [SealFact(name=n, passed=p, found=f) for n, p, f in
             (("first", False, "1"), ("ok", True, "x"), ("second", False, "2"))]
        )  # fmt: skip


# -- the hypervisor's view -----------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Incarnation:
    FakeNet().install(monkeypatch)
    made = incarnation(tmp_path, FakeLibvirt(tmp_path), Ledger(tmp_path / "l.db"))
    made.start()
    made.resume()
    return made


NIC = "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:77:00:0b\r\n"


@pytest.mark.parametrize(
    ("said", "passed"),
    [
        (NIC + " \\ hostnet0: index=0,type=tap,fd=30\r\n", True),
        (NIC, False),
        ("", False),
        (NIC + " \\ user0: index=0,type=user,net=10.0.2.0,restrict=off\r\n", False),
        (
            NIC
            + " \\ h0: index=0,type=tap,fd=30\r\nnet1: index=0,type=nic\r\n \\ h1: index=0,type=tap,fd=31\r\n",
            False,
        ),
        (NIC + " \\ h0: index=0,type=tap,fd=30\r\nhub 0\r\n \\ s0: index=0,type=socket,\r\n", False),
        (NIC + " \\ h0: index=0,type=vhost-user\r\n", False),
    ],
)
def test_one_tap_and_no_other_back_end(
    machine: Incarnation, monkeypatch: pytest.MonkeyPatch, said: str, passed: bool
) -> None:
    monkeypatch.setattr(machine, "hmp", lambda _command: said)
    assert hypervisor_facts(machine, 1)[0].passed is passed


def test_qemu_in_the_hosts_namespace_is_not_sealed(machine: Incarnation) -> None:
    own = netlink.namespace_inode()
    assert hypervisor_facts(machine, own - 1)[1].passed
    assert not hypervisor_facts(machine, own)[1].passed
    machine.pid = None
    assert not hypervisor_facts(machine, own - 1)[1].passed


def test_a_machine_whose_process_is_gone_is_named(machine: Incarnation) -> None:
    machine.pid = 1 << 22  # the kernel gives no process this number
    with pytest.raises(LabError, match=r"^origin: its process 4194304 cannot be looked at: No such file"):
        hypervisor_facts(machine, 1)


# -- from inside ---------------------------------------------------------------------------------------


def test_all_held_from_an_honest_guest(machine: Incarnation) -> None:
    assert {r.outcome for r in guest_paths(machine, [machine])} == {"held"}


def test_a_cell_with_a_world_is_held_on_all_its_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every machine's resolver is the world, the world's own too."""
    FakeNet().install(monkeypatch)
    libvirt, ledger = FakeLibvirt(tmp_path), Ledger(tmp_path / "l.db")
    made = {n: incarnation(tmp_path, libvirt, ledger, n) for n in ("origin", "world")}
    for m in made.values():
        m.start()
        m.resume()
        m.plug()
        libvirt.guest(m.name).paths["resolve-outside"] = "answered by 10.77.0.1"
    results = paths_from_all(list(made.values()))
    assert {r.machine for r in results} == {"origin", "world"}
    assert {r.outcome for r in results} == {"held"}
    made["world"].unplug()
    leaked = {(r.machine, r.name) for r in paths_from_all(list(made.values())) if r.outcome == "leaked"}
    assert ("origin", isolation._RESOLVER) in leaked, "a world that is cut off cannot have answered"


@pytest.mark.parametrize(
    "reply",
    [
        {"results": {"tcp4-outside": 1}},
        {"results": {"x" * 41: "held"}},
        {"results": {"tcp4-outside": "x" * 201}},
        {"results": {str(i): "held" for i in range(41)}},
        {"results": [], },
        {"results": {}, "verdict": "held"},
        [],
    ],
)  # fmt: skip
def test_an_answer_of_another_shape_is_tampering(
    machine: Incarnation, monkeypatch: pytest.MonkeyPatch, reply: object
) -> None:
    import tests.fakes.machine as fake

    monkeypatch.setitem(fake._SCRIPTS, isolation._SCRIPT, lambda _g, _a: reply)
    with pytest.raises(GuestTamperError):
        guest_paths(machine, [])


def test_a_silent_machine_has_all_its_ways_unverified(machine: Incarnation, tmp_path: Path) -> None:
    machine.pause()
    results = paths_from_all([machine])
    assert [r.outcome for r in results] == ["unverified"] * len(WAYS)
    assert "does not answer" in results[0].negative


# -- for real, in a namespace of its own ---------------------------------------------------------------


@in_namespace
def test_an_empty_namespace_is_sealed_and_a_bridge_of_ours_keeps_it_so() -> None:
    netlink.without_ipv6_from_now_on()
    assert all(f.passed for f in namespace_facts(netlink.view(), set(), set()))
    netlink.create_bridge("hcb1", "hca1")
    add_tap("hct1")
    netlink.plug("hct1", "hcb1", "52:54:00:77:00:0b")
    known = {"hcb1"}, {"hct1", "hca1"}
    assert [f for f in namespace_facts(netlink.view(), *known) if not f.passed] == []
    assert not all(f.passed for f in namespace_facts(netlink.view(), set(), set()))


@in_namespace
def test_what_is_added_to_a_namespace_is_seen() -> None:
    netlink.create_bridge("hcb1", "hca1")
    known = {"hcb1"}, {"hca1"}
    with IPRoute() as ip:
        bridge = ip.link_lookup(ifname="hcb1")[0]
        ip.addr("add", index=bridge, address="10.77.0.254", prefixlen=24)
        facts = {f.name: f.passed for f in namespace_facts(netlink.view(), *known)}
        assert list(facts.values()) == [True, False, False]  # an address, and the route that it makes
        ip.route("add", dst="0.0.0.0/0", gateway="10.77.0.1")
        assert any(r.startswith("default") for r in netlink.view().routes)
        ip.addr("del", index=bridge, address="10.77.0.254", prefixlen=24)
        assert all(f.passed for f in namespace_facts(netlink.view(), *known))
        ip.link("add", ifname="v0", kind="veth", peer="v1")
        assert not namespace_facts(netlink.view(), *known)[0].passed


def test_the_question_to_a_guest_never_becomes_code(machine: Incarnation) -> None:
    guest = machine._libvirt.guests["origin"]  # type: ignore[attr-defined]
    asked: list[list[str]] = []
    kept = guest.guest_exec

    def spy(path: str, arg: list[str], **more: object) -> dict[str, int]:
        asked.append([path, *arg])
        answer: dict[str, int] = kept(path, arg, **more)
        return answer

    guest.guest_exec = spy
    guest_paths(machine, [machine])
    assert asked[0][:3] == ["/usr/bin/python3", "-I", "-"]
    assert json.loads(asked[0][3])["peers"] == ["10.77.0.11"]
