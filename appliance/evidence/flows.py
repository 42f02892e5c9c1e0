"""Who talked to whom, from a capture file. Written for packets that a hostile guest made.

A packet belongs to a machine if its source or destination has the machine's hardware address or its
address: a machine can send under no hardware address but the one we gave it (``cell/netlink.py``).
Byte counts are lengths on the wire; the payload of TCP and UDP is computed from the headers' lengths,
since the capture holds only the first bytes of a packet. What lies behind the length that a header admits
to is payload too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import dpkt
from pydantic import Field

from appliance.errors import EvidenceError
from appliance.evidence.dissect import Key, Parts, dissect_packet, is_group
from appliance.model import Frozen

MAX_FLOWS = 5_000  # about 1 KiB each in memory, in each window
MAX_PACKET = 1 << 18  # libpcap's own limit; a longer record means a damaged file
_ETHERNET = 1
_EVERYBODY = "ff:ff:ff:ff:ff:ff"

# How a machine asks whether another is there. Kernels do so seconds after the last real packet.
NEIGHBOUR = frozenset({"arp", "ndp"})
_FOLDED_PROTOS = NEIGHBOUR | {"tcp", "udp", "icmp", "icmp6", "malformed"}


class Window(NamedTuple):
    """A span of the host's clock, Unix seconds, both ends included."""

    begin: float
    end: float


class Flow(Frozen):
    """All packets of one window with the same addresses, protocol and ports, in one direction.

    ``proto`` is ``tcp``, ``udp``, ``icmp``, ``icmp6``, ``arp``, ``ndp`` (IPv6 neighbour discovery),
    ``ip-N``, ``ether-XXXX``, ``malformed``, or ``other`` in a folded flow. ``size`` is bytes on the wire,
    ``payload`` bytes carried by TCP, UDP, else IP, else the frame. ``syns`` counts connection requests,
    ``accepts`` the answers to such (SYN with ACK). Ports are 0 where there are none.

    A window keeps :data:`MAX_FLOWS` flows as they are and folds the rest: ports are 0, and only what belongs
    to a known machine keeps its address. Whatever floods the table, the sums between two known machines
    stay right.
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

    @property
    def to_many(self) -> bool:
        """True if the receiver is a group: broadcast or multicast."""
        return is_group(self.dst_mac)


class Traffic(Frozen):
    """The flows of one window of a capture, and how many packets could not be parsed."""

    begin: float
    end: float
    flows: tuple[Flow, ...] = ()
    packets: int = 0
    malformed: int = 0
    truncated: bool = Field(default=False, description="the file ends inside a packet")
    overflow: bool = Field(default=False, description="there were more flows than are kept; some are folded")


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


class _Tally:
    """Mutable sums of one window."""

    def __init__(self, window: Window, known: Sequence[Endpoint]) -> None:
        self.window = window
        self.macs = {e.mac.lower() for e in known}
        self.addresses = {a for e in known for a in e.addresses}
        self.flows: dict[Key, list[float]] = {}
        self.overflow = False
        self.packets = 0
        self.malformed = 0

    def add(self, at: float, size: int, facts: Parts) -> None:
        self.packets += 1
        self.malformed += facts.key.proto == "malformed"
        key = facts.key
        if key not in self.flows and len(self.flows) >= MAX_FLOWS:
            self.overflow = True
            key = self._folded(key)
        sums = self.flows.setdefault(key, [0, 0, 0, 0, 0, at, at])
        for i, more in enumerate((1, size, facts.carried(size), facts.syn, facts.accept)):
            sums[i] += more
        sums[5], sums[6] = min(sums[5], at), max(sums[6], at)

    def _folded(self, key: Key) -> Key:
        """One of few keys, however many are made up: as many as pairs of known machines and protocols."""
        return Key(
            src_mac=key.src_mac if key.src_mac in self.macs else "",
            dst_mac=key.dst_mac if key.dst_mac in self.macs else _EVERYBODY if is_group(key.dst_mac) else "",
            src=key.src if key.src in self.addresses else "",
            dst=key.dst if key.dst in self.addresses else "",
            proto=key.proto if key.proto in _FOLDED_PROTOS else "other",
            sport=0,
            dport=0,
        )

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
            overflow=self.overflow,
        )


def read(path: Path, windows: Sequence[Window], known: Sequence[Endpoint]) -> tuple[Traffic, ...]:
    """The traffic of each window, in one pass over the file and in memory that does not grow with it.

    ``known`` are the machines whose packets stay apart from all others, however many flows there are.
    Packets that cannot be parsed are counted as ``malformed`` and attributed by hardware address.

    Raises:
        EvidenceError: the file is missing, or is no Ethernet capture in pcap form.
    """
    tallies = [_Tally(w, known) for w in windows]
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


def unanswered(traffic: Traffic, src: Endpoint, dst: Endpoint) -> int:
    """Number of connection requests that got no answer: what a blocked attempt looks like.

    A request sent again counts each time. A refusal (RST) is an answer of the network's, not an accept, so
    it counts as unanswered too. Of folded flows, which have no ports, the accepts are taken off the requests.
    """
    asked = [f for f in between(traffic, src, dst) if f.proto == "tcp"]
    answers = [f for f in between(traffic, dst, src) if f.accepts]
    accepted = {(f.dst, f.src, f.dport, f.sport) for f in answers if _ports(f)}
    plain = sum(f.syns for f in asked if _ports(f) and (f.src, f.dst, f.sport, f.dport) not in accepted)
    folded = sum(f.syns for f in asked if not _ports(f)) - sum(f.accepts for f in answers if not _ports(f))
    return plain + max(0, folded)


def _ports(flow: Flow) -> bool:
    return bool(flow.sport or flow.dport)


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
