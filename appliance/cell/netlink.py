"""The one door to rtnetlink: bridges, ports and what exists in the present network namespace.

A cell's bridge has no address and no IPv6, so the host has no IP presence on the segment at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyroute2 import IPRoute, NetlinkError

from appliance.errors import LabError, PrerequisiteError

_CLONE_NEWNET = 0x40000000
# linux/if_tun.h
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_held: dict[str, int] = {}
_BRIDGE_MAC = "02:68:63:00:00:01"
# linux/neighbour.h: an entry that nobody learned and that does not age, in the bridge's own table
_NUD_NOARP, _NTF_MASTER = 0x40, 0x04


class Link(NamedTuple):
    """One network interface of the namespace."""

    number: int
    name: str
    kind: str
    up: bool
    master: int | None


class NamespaceView(NamedTuple):
    """Everything that could be a way out of a network namespace."""

    links: tuple[Link, ...]
    addresses: tuple[str, ...]
    routes: tuple[str, ...]


def unshare_network() -> None:
    """Move this thread (and every thread it starts later) into a new, empty network namespace.

    Raises:
        PrerequisiteError: not root, or the kernel has no network namespaces.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise PrerequisiteError(
            f"unshare(CLONE_NEWNET): {os.strerror(code)}", hint="run as root (CAP_SYS_ADMIN is needed)"
        )


def namespace_inode(pid: int | str = "self") -> int:
    """Identity of a process's network namespace."""
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


@contextlib.contextmanager
def _route(what: str) -> Iterator[Any]:
    try:
        with IPRoute() as ip:
            yield ip
    except (NetlinkError, OSError) as e:  # OSError: no descriptor is free, or a knob cannot be written
        raise LabError(f"netlink could not {what}: {e}") from e


def view() -> NamespaceView:
    """Links, addresses and routes of the present namespace (loopback's own left out)."""
    with _route("read the namespace") as ip:
        links = tuple(_link(m) for m in ip.get_links())
        loopback = {link.number for link in links if link.kind == "loopback"}
        addresses = tuple(
            f"{m.get_attr('IFA_ADDRESS')}/{m['prefixlen']} dev {m['index']}"
            for m in ip.get_addr()
            if m["index"] not in loopback
        )
        routes = tuple(
            f"{m.get_attr('RTA_DST') or 'default'} dev {m.get_attr('RTA_OIF')}"
            for m in ip.get_routes()
            if m.get_attr("RTA_OIF") not in loopback
        )
    return NamespaceView(links, addresses, routes)


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info else None
    loopback = bool(message["flags"] & 0x8)
    return Link(
        message["index"],
        message.get_attr("IFLA_IFNAME"),
        "loopback" if loopback else (kind or "physical"),
        bool(message["flags"] & 0x1),
        message.get_attr("IFLA_MASTER"),
    )


def create_bridge(name: str, anchor: str) -> None:
    """A bridge without address, IPv6, multicast snooping or learning delay, up.

    ``anchor`` is a port that stays plugged and drops what it gets. A bridge without any has no carrier and
    drops every frame, so a capture could not be shown to work before the first machine is on the segment.

    Raises:
        LabError: it exists already or cannot be made.
    """
    with _route(f"create the bridge {name}") as ip:
        ip.link("add", ifname=name, kind="bridge", br_forward_delay=0, br_mcast_snooping=0, br_stp_state=0)
        _without_ipv6(name)
        # An address of its own: without one the bridge takes over that of a tap, and that guest with it.
        ip.link("set", index=_index(ip, name), address=_BRIDGE_MAC)
        ip.link("set", index=_index(ip, name), state="up")
        _hold_tap(anchor)
        _without_ipv6(anchor)
        # One frame of queue: what is flooded to it is dropped, not kept.
        ip.link("set", index=_index(ip, anchor), master=_index(ip, name), txqlen=1)
        _lock(ip, _index(ip, anchor))
        _require_locked(ip, _index(ip, anchor))
        ip.link("set", index=_index(ip, anchor), state="up")


def _lock(ip: Any, port: int) -> None:
    """The bridge takes a frame from this port only if its sender's address was entered for it by :func:`plug`.

    A guest with root can send under any address; what it cannot do is have such a frame arrive anywhere. So the
    hardware address of every frame on a segment names its machine. See ``locked`` in bridge(8).
    """
    ip.brport("set", index=port, locked=1, learning=0)


def _require_locked(ip: Any, port: int) -> None:
    """A kernel that does not know the attribute ignores it."""
    (link,) = ip.get_links(port)
    if link.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_LOCKED") != 1:
        raise LabError(
            "this kernel cannot lock a bridge's ports, so machines could send under each other's address",
            hint="Linux 5.18 or newer is needed; Debian 12 has 6.1",
        )


def _hold_tap(name: str) -> None:
    """A tap that nobody reads: it carries as long as we hold it open, and goes when we do.

    No kernel module beyond the one that machines need anyway (loading ``dummy`` or ``ifb`` would leave links
    of theirs in the host's own namespace).
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError as e:
        os.close(fd)
        raise LabError(f"the tap {name} cannot be made: {e.strerror}") from e
    _held[name] = fd


def without_ipv6_from_now_on() -> None:
    """Every interface made later in this namespace has no IPv6: libvirt brings its taps up by itself."""
    _without_ipv6("default")


def _without_ipv6(name: str) -> None:
    """No link-local address: an IPv6 stack on the bridge would be a host service guests can reach."""
    knob = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    if knob.exists():
        knob.write_text("1")


def delete_link(name: str) -> bool:
    """Remove an interface by exact name. False if there was none."""
    held = _held.pop(name, None)
    if held is not None:
        os.close(held)  # it goes with its last holder
        return True
    with _route(f"delete {name}") as ip:
        index = _find(ip, name)
        if index is None:
            return False
        ip.link("del", index=index)
        return True


def unplug(tap: str) -> None:
    """Cut a machine off: its tap leaves the bridge and goes down. A tap that is gone is cut already."""
    with _route(f"unplug {tap}") as ip:
        index = _find(ip, tap)
        if index is None:
            return
        try:
            ip.link("set", index=index, master=0, state="down")
        except NetlinkError as e:
            if e.code != errno.ENODEV:
                raise


def plug(tap: str, bridge: str, mac: str) -> None:
    """Join a machine's tap to its cell's bridge, which takes frames of this hardware address from it and no other.

    Raises:
        LabError: the tap or the bridge does not exist.
    """
    with _route(f"plug {tap} into {bridge}") as ip:
        _without_ipv6(tap)
        port = _index(ip, tap)
        # It comes up last: until then no frame passes, and from then on none of another's.
        ip.link("set", index=port, master=_index(ip, bridge), state="down")
        _lock(ip, port)
        ip.fdb("replace", ifindex=port, lladdr=mac, state=_NUD_NOARP, flags=_NTF_MASTER)
        ip.link("set", index=port, state="up")


def _find(ip: Any, name: str) -> int | None:
    with contextlib.suppress(OSError):  # whatever it is: only netlink's word counts for "there is none"
        return socket.if_nametoindex(name)  # 0.006 ms instead of 0.5
    found = ip.link_lookup(ifname=name)
    return int(found[0]) if found else None


def _index(ip: Any, name: str) -> int:
    index = _find(ip, name)
    if index is None:
        raise LabError(f"there is no interface {name} in the sealed namespace")
    return index
