"""There is no way out of a cell: shown from inside its machines and from the hypervisor's own view.

Each claim comes with a control that must fail: a hole is made on purpose, inside the sealed namespace, and
the same test has to find it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute

from appliance.cell import netlink
from appliance.cell.cell import Cell
from appliance.cell.isolation import paths_from_all, require_sealed
from appliance.cell.spec import anchor_name
from appliance.errors import SealError
from appliance.pipeline.process import cell_facts
from tests.vm.conftest import OpenCell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]
WAYS_OUT = 9


def links_of(cell: Cell) -> tuple[set[str], set[str]]:
    return {cell.bridge}, {anchor_name(cell.id), *(m.spec.tap for m in cell.machines.values())}


@pytest.fixture
def stranger() -> Iterator[str]:
    """The end of a veth pair whose other end is a host with addresses: what no cell may ever contain."""
    names = [f"x{secrets.token_hex(3)}" for _ in range(2)]
    with IPRoute() as ip:
        ip.link("add", ifname=names[0], kind="veth", peer=names[1])
        index = ip.link_lookup(ifname=names[1])[0]
        ip.addr("add", index=index, address="10.77.0.99", prefixlen=24)
        ip.addr("add", index=index, address="192.0.2.1", prefixlen=32)
        ip.link("set", index=index, state="up")
        ip.link("set", index=ip.link_lookup(ifname=names[0])[0], state="up")
    yield names[0]
    netlink.delete_link(names[0])


def test_no_way_out_from_inside_any_machine(open_cell: OpenCell) -> None:
    """IPv4, IPv6, link-local, metadata, DNS and strangers, each beside a twin that works on the same path."""
    results = paths_from_all(list(open_cell("origin", "target-1").machines.values()))
    assert len(results) == 2 * WAYS_OUT
    assert {(r.outcome) for r in results} == {"held"}, [r for r in results if r.outcome != "held"]


def test_the_world_is_no_way_out_either(open_cell: OpenCell) -> None:
    """With a default route and a resolver that answer, there still is nothing behind them."""
    cell = open_cell("origin", "world")
    results = paths_from_all(list(cell.machines.values()))
    assert len(results) == 2 * WAYS_OUT
    assert {r.outcome for r in results} == {"held"}, [r for r in results if r.outcome != "held"]
    resolver = next(r for r in results if r.name == "dns name through the resolver" and r.machine == "origin")
    assert resolver.negative == f"answered by {cell.machine('world').spec.machine.address}"


def test_a_machine_without_a_peer_is_unverified_not_held(open_cell: OpenCell) -> None:
    results = paths_from_all(list(open_cell("origin").machines.values()))
    assert {r.outcome for r in results} == {"unverified"}


def test_an_unplugged_cell_is_unverified_not_held(open_cell: OpenCell) -> None:
    results = paths_from_all(list(open_cell("origin", "target-1", plug=False).machines.values()))
    assert "held" not in {r.outcome for r in results}


def test_the_hypervisor_shows_one_tap_each_in_the_sealed_namespace(open_cell: OpenCell, sealed: int) -> None:
    cell = open_cell("origin", "target-1")
    facts = cell_facts(cell, lambda: links_of(cell), sealed)
    assert len(facts) == 8
    require_sealed(facts)


def test_a_hole_is_found_from_both_sides(open_cell: OpenCell, sealed: int, stranger: str) -> None:
    """Control: a host on the segment must be seen by the namespace's view and by a guest."""
    cell = open_cell("origin", "target-1")
    with IPRoute() as ip:
        bridge = ip.link_lookup(ifname=cell.bridge)[0]
        ip.link("set", index=ip.link_lookup(ifname=stranger)[0], master=bridge)
    with pytest.raises(SealError, match=stranger):
        require_sealed(cell_facts(cell, lambda: links_of(cell), sealed))
    leaked = {r.name for r in paths_from_all(list(cell.machines.values())) if r.outcome == "leaked"}
    assert "strangers on the segment, arp" in leaked


def test_a_host_address_on_the_bridge_is_found(open_cell: OpenCell, sealed: int) -> None:
    """Control: an address of the host on the segment would make every host service reachable."""
    cell = open_cell("origin", "target-1")
    with IPRoute() as ip:
        ip.addr("add", index=ip.link_lookup(ifname=cell.bridge)[0], address="10.77.0.98", prefixlen=24)
    with pytest.raises(SealError, match="no address on any segment"):
        require_sealed(cell_facts(cell, lambda: links_of(cell), sealed))
    leaked = {r.name for r in paths_from_all(list(cell.machines.values())) if r.outcome == "leaked"}
    assert "strangers on the segment, arp" in leaked


# As root in a guest: a connection to a peer under each of these hardware addresses.
_UNDER_ADDRESSES = """
import socket, subprocess, sys
peer, *addresses = sys.argv[1:]
for address in addresses:
    subprocess.run(["ip", "link", "set", "eth0", "address", address], check=True)
    subprocess.run(["ip", "neigh", "flush", "dev", "eth0"], check=True)
    try:
        socket.create_connection((peer, 22), 6).close()
        print("open")
    except TimeoutError:
        print("timeout")
    except OSError as e:
        print(e)
"""


def test_what_a_machine_sends_under_another_address_arrives_nowhere(open_cell: OpenCell) -> None:
    """Neither under one that is made up nor under its peer's, each between two twins under its own."""
    cell = open_cell("origin", "target-1")
    origin, target = (cell.machine(n) for n in ("origin", "target-1"))
    own, peer = origin.spec.machine.mac, target.spec.machine
    done = origin.qga.python(
        _UNDER_ADDRESSES, peer.address, own, "52:54:00:77:00:aa", own, peer.mac, own, timeout_s=90
    )
    said = done.text.split("\n")[:5]
    assert [said[0], said[2], said[4]] == ["open"] * 3, said
    assert "open" not in (said[1], said[3]), said
