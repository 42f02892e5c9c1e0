"""Links for real, each test in a network namespace of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import socket
import struct
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from appliance.cell import netlink
from appliance.errors import LabError
from tests.fakes.namespace import add_tap, in_namespace, master_of

MAC, PEER = "52:54:00:77:00:0b", "52:54:00:77:00:15"
EVERYBODY = "ff:ff:ff:ff:ff:ff"


def flags_of(name: str) -> set[str]:
    with IPRoute() as ip:
        link = ip.get_links(ip.link_lookup(ifname=name)[0])[0]
    return {"up"} if link["flags"] & 1 else set()


@in_namespace
def test_a_bridge_has_no_address_and_carries_frames_before_any_machine_is_on_it() -> None:
    netlink.create_bridge("hcb1", "hca1")
    view = netlink.view()
    assert view.addresses == ()
    kinds = {x.name: x.kind for x in view.links}
    assert (kinds["hcb1"], kinds["hca1"]) == ("bridge", "tun")
    with IPRoute() as ip:
        carrier = {x.get_attr("IFLA_IFNAME"): x.get_attr("IFLA_CARRIER") for x in ip.get_links()}
    assert carrier["hcb1"] == 1, "a bridge without a carrier drops every frame"
    assert master_of("hca1") == "hcb1"
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("hcb1", 0))
        assert s.send(b"\xff" * 12 + b"\x88\xb5" + bytes(50)) == 64


@in_namespace
def test_plug_and_unplug_move_a_tap_on_and_off_its_bridge() -> None:
    netlink.create_bridge("hcb1", "hca1")
    add_tap("hct1")
    for _ in range(2):
        netlink.plug("hct1", "hcb1", MAC)
        assert (master_of("hct1"), flags_of("hct1")) == ("hcb1", {"up"})
    for _ in range(2):
        netlink.unplug("hct1")
        assert (master_of("hct1"), flags_of("hct1")) == (None, set())
    netlink.unplug("hctgone")  # a tap that is gone is cut already
    assert netlink.view().addresses == (), "no IPv6 of ours on any port"


class Guest:
    """A tap with somebody at its other end, who sends whatever he likes."""

    def __init__(self, tap: str) -> None:
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self._fd, netlink._TUNSETIFF, struct.pack("16sH22x", tap.encode(), 0x1002))

    def send(self, src: str, dst: str, note: bytes) -> None:
        os.write(self._fd, raw(dst) + raw(src) + b"\x88\xb5" + note.ljust(50, b"\0"))

    def heard(self) -> list[bytes]:
        """Notes that came since it was asked last; a bridge delivers within the sender's own call."""
        notes = []
        while select.select([self._fd], [], [], 0.05)[0]:
            frame = os.read(self._fd, 2000)
            if frame[12:14] == b"\x88\xb5":  # not what a kernel says by itself
                notes.append(frame[14:].rstrip(b"\0"))
        return notes


def raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


@in_namespace
def test_a_machine_can_send_under_no_address_but_its_own() -> None:
    netlink.create_bridge("hcb1", "hca1")
    origin, target = Guest("hct1"), Guest("hct2")
    netlink.plug("hct1", "hcb1", MAC)
    netlink.plug("hct2", "hcb1", PEER)
    for dst in (PEER, EVERYBODY, "01:80:c2:00:00:00", "33:33:00:00:00:01"):
        origin.send(MAC, dst, b"own")
        origin.send("52:54:00:77:00:aa", dst, b"made up")
        origin.send(PEER, dst, b"the receiver's")
        origin.send(netlink._BRIDGE_MAC, dst, b"the bridge's")
        assert target.heard() == [b"own"], dst
    netlink.unplug("hct1")
    netlink.plug("hct1", "hcb1", MAC)
    origin.send(MAC, PEER, b"again")
    assert target.heard() == [b"again"]


@in_namespace
def test_a_machine_cannot_take_the_place_of_another_on_its_segment() -> None:
    """No address is learned: frames for a machine go on going there, whoever sends under its name."""
    netlink.create_bridge("hcb1", "hca1")
    origin, target, other = Guest("hct1"), Guest("hct2"), Guest("hct3")
    for tap, mac in (("hct1", MAC), ("hct2", PEER), ("hct3", "52:54:00:77:00:16")):
        netlink.plug(tap, "hcb1", mac)
    other.send(PEER, EVERYBODY, b"I am the target")
    origin.send(MAC, PEER, b"secret")
    assert (target.heard(), other.heard()) == ([b"secret"], [])


@in_namespace
def test_a_kernel_that_cannot_lock_a_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "_lock", lambda _ip, _port: None)  # as one that ignores the attribute
    with pytest.raises(LabError, match="cannot lock"):
        netlink.create_bridge("hcb1", "hca1")


@in_namespace
def test_plugging_what_is_not_there_is_an_error() -> None:
    add_tap("hct1")
    for tap, bridge in (("hct1", "hcbgone"), ("hctgone", "hcbgone")):
        with pytest.raises(LabError, match="gone"):
            netlink.plug(tap, bridge, MAC)


@in_namespace
def test_a_bridge_of_that_name_is_an_error_and_a_deleted_link_is_none() -> None:
    netlink.create_bridge("hcb1", "hca1")
    with pytest.raises(LabError, match="hcb1"):
        netlink.create_bridge("hcb1", "hca2")
    assert netlink.delete_link("hcb1")
    assert not netlink.delete_link("hcb1")


@in_namespace
def test_an_anchor_goes_with_its_bridge_and_is_made_again() -> None:
    for _ in range(3):
        netlink.create_bridge("hcb1", "hca1")
        assert netlink.delete_link("hca1")
        assert netlink.delete_link("hcb1")
        assert [x.name for x in netlink.view().links] == ["lo"]
    assert not netlink.delete_link("hca1")


@in_namespace
def test_an_anchor_takes_any_number_of_frames() -> None:
    netlink.create_bridge("hcb1", "hca1")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("hcb1", 0))
        for _ in range(3000):
            s.send(b"\xff" * 12 + b"\x88\xb5" + bytes(1400))


@in_namespace
def test_an_anchor_whose_name_is_taken_is_an_error() -> None:
    netlink.create_bridge("hcb1", "hca1")
    with pytest.raises(LabError, match="hca1"):
        netlink.create_bridge("hcb2", "hca1")


@in_namespace
def test_names_are_exact() -> None:
    add_tap("hct1")
    add_tap("hct11")
    assert netlink.delete_link("hct1")
    assert [x.name for x in netlink.view().links if x.kind == "tun"] == ["hct11"]
    assert not netlink.delete_link("hct")


@in_namespace
def test_two_cells_have_each_their_own_segment() -> None:
    for n in (1, 2):
        netlink.create_bridge(f"hcb{n}", f"hca{n}")
        add_tap(f"hct{n}")
        netlink.plug(f"hct{n}", f"hcb{n}", MAC)
    assert (master_of("hct1"), master_of("hct2")) == ("hcb1", "hcb2")


@in_namespace
def test_unsharing_leaves_every_link_behind() -> None:
    add_tap("hct1")
    before = netlink.namespace_inode()
    netlink.unshare_network()
    assert netlink.namespace_inode() != before
    assert [x.name for x in netlink.view().links] == ["lo"]
    assert netlink.view().routes == ()


def test_the_namespace_of_a_process_that_is_gone_is_an_error() -> None:
    with pytest.raises(OSError, match="No such"):
        netlink.namespace_inode(1 << 22)
    assert netlink.namespace_inode() == Path("/proc/self/ns/net").stat().st_ino


@in_namespace
def test_a_process_without_free_descriptors_gets_an_error_of_ours() -> None:
    """The kill switch goes on to the next machine after any error of ours."""
    add_tap("hct1")
    netlink.unplug("hct1")
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    try:
        with pytest.raises(LabError, match="unplug hct1"):
            netlink.unplug("hct1")
    finally:
        for fd in taken:
            os.close(fd)
    netlink.unplug("hct1")
