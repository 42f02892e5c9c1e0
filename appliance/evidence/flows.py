"""Who talked to whom, from a capture file. Written for packets that a hostile guest made.

A packet belongs to a machine if its source or destination has the machine's hardware address or its
address: hardware addresses are set by us, and a guest's user without root can change neither.
Byte counts are lengths on the wire; the payload of TCP and UDP is computed from the headers' lengths,
since the capture holds only the first bytes of a packet.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import dpkt
from pydantic import Field

from appliance.errors import EvidenceError
from appliance.model import Frozen

MAX_FLOWS = 5_000  # about 1 KiB each in memory, in each window
MAX_PACKET = 1 << 18  # libpcap's own limit; a longer record means a damaged file
_ETHERNET = 1
_FIN_SYN_RST_ACK = 0x01 | 0x02 | 0x04 | 0x10
_SYN = 0x02
_NDP_TYPES = range(133, 138)  # RFC 4861
_SYN_ACK = 0x12

# How a machine asks whether another is there. Kernels do so seconds after the last real packet.
NEIGHBOUR = frozenset({"arp", "ndp"})


class Window(NamedTuple):
    """A span of the host's clock, Unix seconds, both ends included."""

    begin: float
    end: float


class Flow(Frozen):
    """All packets of one window with the same addresses, protocol and ports, in one direction.

    ``proto`` is ``tcp``, ``udp``, ``icmp``, ``icmp6``, ``arp``, ``ndp`` (IPv6 neighbour discovery),
    ``ip-N``, ``ether-XXXX`` or ``malformed``. ``size`` is bytes on the wire, ``payload`` bytes carried by
    TCP, UDP or else IP. ``syns`` counts connection requests, ``accepts`` the answers to such (SYN with
    ACK). Ports are 0 where there are none, and where a window has more than :data:`MAX_FLOWS` flows.
    """

    src_mac: str
    dst_mac: str
    src: str
    dst: str
    proto: str
    sport: int
    dport: int
    packets: int
    size: int
    payload: int = 0
    syns: int = 0
    accepts: int = 0
    first: float
    last: float


class Traffic(Frozen):
    """The flows of one window of a capture, and how many packets could not be parsed."""

    begin: float
    end: float
    flows: tuple[Flow, ...] = ()
    packets: int = 0
    malformed: int = 0
    truncated: bool = Field(default=False, description="the file ends inside a packet")


class Endpoint(NamedTuple):
    """How packets of one machine are recognised."""

    mac: str
    addresses: tuple[str, ...]

    def sent(self, flow: Flow) -> bool:
        """True if this machine is the sender of a flow."""
        return flow.src_mac == self.mac.lower() or flow.src in self.addresses

    def received(self, flow: Flow) -> bool:
        """True if a flow is addressed to this machine."""
        return flow.dst_mac == self.mac.lower() or flow.dst in self.addresses


class _Key(NamedTuple):
    src_mac: str
    dst_mac: str
    src: str
    dst: str
    proto: str
    sport: int
    dport: int


class _Facts(NamedTuple):
    key: _Key
    payload: int
    syn: bool
    accept: bool


class _Tally:
    """Mutable sums of one window."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.flows: dict[_Key, list[float]] = {}
        self.packets = 0
        self.malformed = 0

    def add(self, at: float, size: int, facts: _Facts) -> None:
        self.packets += 1
        self.malformed += facts.key.proto == "malformed"
        key = facts.key
        if key not in self.flows and len(self.flows) >= MAX_FLOWS:
            key = key._replace(sport=0, dport=0)
            if key not in self.flows and len(self.flows) >= 2 * MAX_FLOWS:
                key = key._replace(src="", dst="", src_mac="", dst_mac="")
        sums = self.flows.setdefault(key, [0, 0, 0, 0, 0, at, at])
        for i, more in enumerate((1, size, facts.payload, facts.syn, facts.accept)):
            sums[i] += more
        sums[5], sums[6] = min(sums[5], at), max(sums[6], at)

    def traffic(self, truncated: bool) -> Traffic:
        flows = [
            Flow(
                **key._asdict(),
                packets=int(s[0]), size=int(s[1]), payload=int(s[2]), syns=int(s[3]), accepts=int(s[4]),
                first=s[5], last=s[6],
            )
            for key, s in self.flows.items()
        ]  # fmt: skip
        return Traffic(
            begin=self.window.begin,
            end=self.window.end,
            flows=tuple(sorted(flows, key=lambda f: (f.first, f.src, f.dst, f.proto, f.sport, f.dport))),
            packets=self.packets,
            malformed=self.malformed,
            truncated=truncated,
        )


def read(path: Path, windows: Sequence[Window]) -> tuple[Traffic, ...]:
    """The traffic of each window, in one pass over the file and in memory that does not grow with it.

    Packets that cannot be parsed are counted as ``malformed`` and attributed by hardware address.

    Raises:
        EvidenceError: the file is missing, or is no Ethernet capture in pcap form.
    """
    tallies = [_Tally(w) for w in windows]
    truncated = False
    try:
        with path.open("rb") as f:
            for packet in _packets(path, f):
                if packet is None:
                    truncated = True
                    break
                at, size, content = packet
                inside = [t for t in tallies if t.window.begin <= at <= t.window.end]
                if inside:
                    facts = dissect_packet(content)
                    for tally in inside:
                        tally.add(at, size, facts)
    except OSError as e:
        raise EvidenceError(f"{path}: the capture cannot be read: {e.strerror or e}", path=str(path)) from e
    return tuple(t.traffic(truncated) for t in tallies)


def between(traffic: Traffic, src: Endpoint, dst: Endpoint) -> tuple[Flow, ...]:
    """All flows from one machine to another, of every protocol."""
    return tuple(f for f in traffic.flows if src.sent(f) and dst.received(f))


def packets_between(path: Path, src: Endpoint, dst: Endpoint, window: Window) -> int:
    """Number of packets from one machine to another within a window, neighbour discovery left out.

    Raises:
        EvidenceError: as :func:`read`.
    """
    (traffic,) = read(path, [window])
    return sum(f.packets for f in between(traffic, src, dst) if f.proto not in NEIGHBOUR)


def unanswered(traffic: Traffic, src: Endpoint, dst: Endpoint) -> int:
    """Number of connection requests that got no answer: what a blocked attempt looks like.

    A request sent again counts each time. A refusal (RST) is an answer of the network's, not an accept, so
    it counts as unanswered too.
    """
    accepted = {(f.dst, f.src, f.dport, f.sport) for f in between(traffic, dst, src) if f.accepts}
    return sum(
        f.syns
        for f in between(traffic, src, dst)
        if f.proto == "tcp" and (f.src, f.dst, f.sport, f.dport) not in accepted
    )


def _packets(path: Path, f: BinaryIO) -> Iterator[tuple[float, int, bytes] | None]:
    """Time, length on the wire and captured bytes of each packet; None where the file is cut.

    dpkt's own reader drops the length on the wire, so its headers are read here.
    """
    start = f.read(dpkt.pcap.FileHdr.__hdr_len__)
    try:
        header = dpkt.pcap.FileHdr(start)
        if header.magic in (dpkt.pcap.PMUDPCT_MAGIC, dpkt.pcap.PMUDPCT_MAGIC_NANO):
            header = dpkt.pcap.LEFileHdr(start)
        record_header = dpkt.pcap.MAGIC_TO_PKT_HDR[dpkt.pcap.FileHdr(start).magic]
    except (dpkt.UnpackError, KeyError) as e:
        raise EvidenceError(f"{path}: is not a capture in pcap form", path=str(path)) from e
    if header.linktype != _ETHERNET:
        raise EvidenceError(
            f"{path}: has link type {header.linktype}, Ethernet ({_ETHERNET}) is needed", path=str(path)
        )
    divisor = 1e9 if header.magic == dpkt.pcap.TCPDUMP_MAGIC_NANO else 1e6
    length = record_header.__hdr_len__
    while raw := f.read(length):
        if len(raw) < length:
            yield None
            return
        record = record_header(raw)
        content = f.read(record.caplen) if record.caplen <= MAX_PACKET else b""
        if record.caplen > MAX_PACKET or len(content) < record.caplen:
            yield None
            return
        yield record.tv_sec + record.tv_usec / divisor, int(record.len), content


def dissect_packet(content: bytes) -> _Facts:
    """What a flow needs of one Ethernet frame. Never raises, whatever the bytes are."""
    dst_mac, src_mac = content[:6].hex(":"), content[6:12].hex(":")
    try:
        frame = dpkt.ethernet.Ethernet(content)
        return _facts(src_mac, dst_mac, frame)
    except Exception:  # noqa: BLE001 - dpkt meets hostile bytes; whatever it raises means "malformed"
        return _Facts(_Key(src_mac, dst_mac, "", "", "malformed", 0, 0), 0, False, False)


def _facts(src_mac: str, dst_mac: str, frame: dpkt.ethernet.Ethernet) -> _Facts:
    packet = frame.data
    if isinstance(packet, dpkt.arp.ARP):
        src, dst = str(ipaddress.IPv4Address(packet.spa)), str(ipaddress.IPv4Address(packet.tpa))
        return _Facts(_Key(src_mac, dst_mac, src, dst, "arp", 0, 0), 0, False, False)
    if isinstance(packet, dpkt.ip.IP):
        src, dst = str(ipaddress.IPv4Address(packet.src)), str(ipaddress.IPv4Address(packet.dst))
        # Length 0 marks a segment longer than 64 KiB that the kernel has not cut yet.
        carried = max(0, packet.len - packet.hl * 4)
        number = packet.p
    elif isinstance(packet, dpkt.ip6.IP6):
        src, dst = str(ipaddress.IPv6Address(packet.src)), str(ipaddress.IPv6Address(packet.dst))
        extensions = sum(h.length for h in packet.all_extension_headers)
        carried = max(0, packet.plen - extensions)
        number = packet.p if not packet.all_extension_headers else packet.all_extension_headers[-1].nxt
    else:
        return _Facts(_Key(src_mac, dst_mac, "", "", f"ether-{frame.type:04x}", 0, 0), 0, False, False)
    return _transport(_Key(src_mac, dst_mac, src, dst, f"ip-{number}", 0, 0), packet.data, carried)


def _transport(key: _Key, segment: object, carried: int) -> _Facts:
    if isinstance(segment, dpkt.tcp.TCP):
        flags = segment.flags & _FIN_SYN_RST_ACK
        return _Facts(
            key._replace(proto="tcp", sport=segment.sport, dport=segment.dport),
            max(0, carried - segment.off * 4),
            flags == _SYN,
            flags == _SYN_ACK,
        )
    if isinstance(segment, dpkt.udp.UDP):
        return _Facts(
            key._replace(proto="udp", sport=segment.sport, dport=segment.dport),
            max(0, carried - 8),
            False,
            False,
        )
    if isinstance(segment, dpkt.icmp.ICMP):
        return _Facts(key._replace(proto="icmp"), carried, False, False)
    if isinstance(segment, dpkt.icmp6.ICMP6):
        proto = "ndp" if segment.type in _NDP_TYPES else "icmp6"
        return _Facts(key._replace(proto=proto), carried, False, False)
    return _Facts(key, carried, False, False)
