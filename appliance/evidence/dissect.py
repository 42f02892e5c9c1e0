"""What a flow needs of one Ethernet frame, whatever bytes a hostile guest put into it."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import dpkt

_FIN_SYN_RST_ACK = 0x01 | 0x02 | 0x04 | 0x10
_SYN = 0x02
_NDP_TYPES = range(133, 138)  # RFC 4861
_SYN_ACK = 0x12
_HEADER = 14  # bytes of an Ethernet header
_SHORTEST = 60  # bytes on the wire; shorter frames may be padded to this


class Key(NamedTuple):
    """What the packets of one flow have in common."""

    src_mac: str
    dst_mac: str
    src: str
    dst: str
    proto: str
    sport: int
    dport: int


class Parts(NamedTuple):
    """One frame. ``admitted``: bytes of it that its headers account for."""

    key: Key
    payload: int
    syn: bool
    accept: bool
    admitted: int = _HEADER

    def carried(self, size: int) -> int:
        """Payload of a frame of ``size`` bytes on the wire."""
        if self.admitted == _HEADER:
            return max(0, size - _HEADER)
        return self.payload + max(0, size - max(self.admitted, _SHORTEST))


def is_group(mac: str) -> bool:
    """True if a hardware address (``aa:bb:...``, may be cut short) is a broadcast or multicast one."""
    return bool(mac) and bool(int(mac[:2], 16) & 1)


def dissect_packet(content: bytes) -> Parts:
    """What a flow needs of one Ethernet frame. Never raises, whatever the bytes are."""
    dst_mac, src_mac = content[:6].hex(":"), content[6:12].hex(":")
    try:
        frame = dpkt.ethernet.Ethernet(content)
        return _parts(src_mac, dst_mac, frame)
    except Exception:  # noqa: BLE001 - dpkt meets hostile bytes; whatever it raises means "malformed"
        return Parts(Key(src_mac, dst_mac, "", "", "malformed", 0, 0), 0, False, False)


def _parts(src_mac: str, dst_mac: str, frame: dpkt.ethernet.Ethernet) -> Parts:
    packet = frame.data
    if isinstance(packet, dpkt.arp.ARP):
        src, dst = str(ipaddress.IPv4Address(packet.spa)), str(ipaddress.IPv4Address(packet.tpa))
        return Parts(Key(src_mac, dst_mac, src, dst, "arp", 0, 0), 0, False, False)
    if isinstance(packet, dpkt.ip.IP):
        src, dst = str(ipaddress.IPv4Address(packet.src)), str(ipaddress.IPv4Address(packet.dst))
        # Length 0 marks a segment longer than 64 KiB that the kernel has not cut yet.
        carried = max(0, packet.len - packet.hl * 4)
        number, admitted = packet.p, _HEADER + max(packet.len, packet.hl * 4)
    elif isinstance(packet, dpkt.ip6.IP6):
        src, dst = str(ipaddress.IPv6Address(packet.src)), str(ipaddress.IPv6Address(packet.dst))
        extensions = sum(h.length for h in packet.all_extension_headers)
        carried = max(0, packet.plen - extensions)
        number = packet.p if not packet.all_extension_headers else packet.all_extension_headers[-1].nxt
        admitted = _HEADER + packet.__hdr_len__ + packet.plen
    else:
        return Parts(Key(src_mac, dst_mac, "", "", f"ether-{frame.type:04x}", 0, 0), 0, False, False)
    parts = _transport(Key(src_mac, dst_mac, src, dst, f"ip-{number}", 0, 0), packet.data, carried)
    return parts._replace(admitted=admitted)


def _transport(key: Key, segment: object, carried: int) -> Parts:
    if isinstance(segment, dpkt.tcp.TCP):
        flags = segment.flags & _FIN_SYN_RST_ACK
        return Parts(
            key._replace(proto="tcp", sport=segment.sport, dport=segment.dport),
            max(0, carried - segment.off * 4),
            flags == _SYN,
            flags == _SYN_ACK,
        )
    if isinstance(segment, dpkt.udp.UDP):
        return Parts(
            key._replace(proto="udp", sport=segment.sport, dport=segment.dport),
            max(0, carried - 8),
            False,
            False,
        )
    if isinstance(segment, dpkt.icmp.ICMP):
        return Parts(key._replace(proto="icmp"), carried, False, False)
    if isinstance(segment, dpkt.icmp6.ICMP6):
        proto = "ndp" if segment.type in _NDP_TYPES else "icmp6"
        return Parts(key._replace(proto=proto), carried, False, False)
    return Parts(key, carried, False, False)
