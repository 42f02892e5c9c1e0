"""Flows from captures, honest and hostile."""

from __future__ import annotations

import io
import random
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import EvidenceError
from appliance.evidence import flows
from appliance.evidence.dissect import dissect_packet
from appliance.evidence.flows import (
    NEIGHBOUR,
    Endpoint,
    Window,
    between,
    read,
    unanswered,
)

A_MAC, B_MAC = "52:54:00:00:00:11", "52:54:00:00:00:21"
A, B = Endpoint(A_MAC, ("10.77.0.11",)), Endpoint(B_MAC, ("10.77.0.21",))
KNOWN = (A, B)
ALL = Window(0, 1e12)
SYN, SYN_ACK, ACK, RST = 0x02, 0x12, 0x10, 0x04


def raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ether(payload: object, kind: int, src: str = A_MAC, dst: str = B_MAC) -> bytes:
    return bytes(dpkt.ethernet.Ethernet(src=raw(src), dst=raw(dst), type=kind, data=payload))


def tcp4(a: str, b: str, sport: int, dport: int, flags: int, data: bytes = b"", **macs: str) -> bytes:
    segment = dpkt.tcp.TCP(sport=sport, dport=dport, flags=flags, data=data)
    packet = dpkt.ip.IP(src=socket.inet_aton(a), dst=socket.inet_aton(b), p=6, data=segment)
    packet.len = len(packet)
    return ether(packet, dpkt.ethernet.ETH_TYPE_IP, **macs)


def packets_between(path: Path, src: Endpoint, dst: Endpoint, window: Window) -> int:
    """Packets from one machine to another in a window, neighbour discovery left out."""
    (traffic,) = read(path, [window], [src, dst])
    return sum(f.packets for f in between(traffic, src, dst) if f.proto not in NEIGHBOUR)


def forth(sport: int, flags: int, data: bytes = b"") -> bytes:
    return tcp4("10.77.0.11", "10.77.0.21", sport, 22, flags, data)


def back(dport: int, flags: int, data: bytes = b"") -> bytes:
    return tcp4("10.77.0.21", "10.77.0.11", 22, dport, flags, data, src=B_MAC, dst=A_MAC)


def v6(next_header: int, payload: object) -> bytes:
    packet = dpkt.ip6.IP6(
        src=socket.inet_pton(socket.AF_INET6, "fd77::11"),
        dst=socket.inet_pton(socket.AF_INET6, "fd77::21"),
        nxt=next_header,
        plen=len(bytes(payload)),  # type: ignore[call-overload]
        data=payload,
    )
    packet.extension_hdrs = {}
    return ether(packet, dpkt.ethernet.ETH_TYPE_IP6)


def capture(path: Path, packets: Sequence[tuple[float, bytes]], snaplen: int = 192) -> Path:
    with path.open("wb") as f:
        f.write(bytes(dpkt.pcap.LEFileHdr(snaplen=snaplen, linktype=1, magic=dpkt.pcap.TCPDUMP_MAGIC)))
        for at, content in packets:
            cut = content[:snaplen]
            f.write(struct.pack("<IIII", int(at), int(at % 1 * 1e6), len(cut), len(content)) + cut)
    return path


def test_bytes_on_the_wire_and_payload_are_right_although_packets_are_cut(tmp_path: Path) -> None:
    packets = [
        (10.5, forth(4000, ACK, b"x" * 1400)),
        (11.25, forth(4000, ACK, b"x" * 600)),
        (12, back(4000, ACK)),
    ]
    (traffic,) = read(capture(tmp_path / "c", packets), [ALL], KNOWN)
    there, here = traffic.flows
    assert (there.src, there.dst, there.proto, there.sport, there.dport) == (
        "10.77.0.11", "10.77.0.21", "tcp", 4000, 22,
    )  # fmt: skip
    assert (there.packets, there.size, there.payload) == (2, 2000 + 2 * 54, 2000)
    assert (there.first, there.last) == (10.5, 11.25)
    assert (here.src, here.payload) == ("10.77.0.21", 0)
    assert (traffic.packets, traffic.malformed, traffic.truncated) == (3, 0, False)


def test_windows_count_what_lies_in_them_and_may_overlap(tmp_path: Path) -> None:
    path = capture(tmp_path / "c", [(t, forth(4000, ACK)) for t in (1, 2, 3, 4)])
    found = read(path, [Window(2, 3), Window(3, 9), Window(7, 8)], KNOWN)
    assert [t.packets for t in found] == [2, 2, 0]
    assert packets_between(path, A, B, Window(2, 9)) == 3
    assert packets_between(path, B, A, ALL) == 0


def test_requests_without_answer_are_blocked_attempts(tmp_path: Path) -> None:
    packets = [
        (1, forth(4000, SYN)), (1.1, back(4000, SYN_ACK)),  # accepted
        (2, forth(4001, SYN)), (3, forth(4001, SYN)),  # dropped, and sent again
        (4, forth(4002, SYN)), (4.1, back(4002, RST | ACK)),  # refused
    ]  # fmt: skip
    (traffic,) = read(capture(tmp_path / "c", packets), [ALL], KNOWN)
    assert unanswered(traffic, A, B) == 3
    assert unanswered(traffic, B, A) == 0
    assert sum(f.syns for f in between(traffic, A, B)) == 4


def test_ipv6_arp_and_neighbour_discovery(tmp_path: Path) -> None:
    segment = dpkt.tcp.TCP(sport=1, dport=8000, flags=ACK, data=b"y" * 50)
    arp = dpkt.arp.ARP(spa=socket.inet_aton("10.77.0.11"), tpa=socket.inet_aton("10.77.0.21"))
    packets = [
        v6(6, segment),
        ether(arp, dpkt.ethernet.ETH_TYPE_ARP),
        v6(58, dpkt.icmp6.ICMP6(type=135, data=b"\0" * 20)),
        v6(58, dpkt.icmp6.ICMP6(type=128, data=b"\0" * 8)),
        v6(17, dpkt.udp.UDP(sport=5, dport=53, ulen=30, data=b"z" * 22)),
        ether(b"hello", 0x88B5),
    ]
    (traffic,) = read(capture(tmp_path / "c", [(i, p) for i, p in enumerate(packets)]), [ALL], KNOWN)
    assert [(f.proto, f.payload) for f in traffic.flows] == [
        ("tcp", 50), ("arp", 28), ("ndp", 24), ("icmp6", 12), ("udp", 22), ("ether-88b5", 5),
    ]  # fmt: skip
    assert traffic.flows[0].src == "fd77::11"
    path = tmp_path / "c"
    assert packets_between(path, A, B, ALL) == 4, "neighbour discovery is left out, other ethertypes are not"


def test_a_machine_is_known_by_its_hardware_address_whatever_it_writes_inside(tmp_path: Path) -> None:
    spoofed = tcp4("192.0.2.1", "192.0.2.2", 1, 2, ACK, b"x")
    broken = raw(B_MAC) + raw(A_MAC) + b"\x08\x00\x00"
    assert packets_between(capture(tmp_path / "c", [(1, spoofed), (2, broken)]), A, B, ALL) == 2


def test_a_cut_file_is_read_up_to_the_cut(tmp_path: Path) -> None:
    path = capture(tmp_path / "c", [(1, forth(4000, ACK)), (2, forth(4000, ACK))])
    content = path.read_bytes()
    for missing in (1, 40, 55, 60):
        path.write_bytes(content[:-missing])
        (traffic,) = read(path, [ALL], KNOWN)
        assert (traffic.packets, traffic.truncated) == (1, True)
    path.write_bytes(content[:24])
    assert read(path, [ALL], KNOWN)[0].packets == 0


@pytest.mark.parametrize("content", [b"", b"\xd4\xc3\xb2\xa1", b"not a capture at all, but long enough"])
def test_what_is_no_capture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(content)
    with pytest.raises(EvidenceError, match="not a capture"):
        read(path, [ALL], KNOWN)
    with pytest.raises(EvidenceError, match="cannot be read"):
        read(tmp_path / "missing", [ALL], KNOWN)
    path.write_bytes(bytes(dpkt.pcap.LEFileHdr(linktype=113, magic=dpkt.pcap.TCPDUMP_MAGIC)))
    with pytest.raises(EvidenceError, match="link type 113"):
        read(path, [ALL], KNOWN)


def test_a_record_of_impossible_length_ends_the_reading(tmp_path: Path) -> None:
    path = capture(tmp_path / "c", [(1, forth(4000, ACK))])
    with path.open("ab") as f:
        f.write(struct.pack("<IIII", 2, 0, 0x7FFFFFFF, 0x7FFFFFFF) + b"x" * 100)
    (traffic,) = read(path, [ALL], KNOWN)
    assert (traffic.packets, traffic.truncated) == (1, True)


def test_a_flood_of_flows_is_summed_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MAX_FLOWS", 50)
    packets = [(i / 10, forth(i % 60000 + 1, SYN)) for i in range(400)]
    (traffic,) = read(capture(tmp_path / "c", packets), [ALL], KNOWN)
    assert len(traffic.flows) == 51
    assert sum(f.syns for f in traffic.flows) == 400
    assert sum(f.packets for f in between(traffic, A, B)) == 400


def solicitation(number: int, src: str = A_MAC) -> bytes:
    """A request for a neighbour that nobody is: any user's connect() makes the kernel send such."""
    wanted = socket.inet_pton(socket.AF_INET6, f"fd77::{number >> 16:x}:{number & 0xFFFF:x}")
    packet = dpkt.ip6.IP6(
        src=socket.inet_pton(socket.AF_INET6, "fd77::11"), dst=b"\xff\x02" + bytes(9) + b"\x01\xff" + wanted[13:],
        nxt=58, plen=24, data=dpkt.icmp6.ICMP6(type=135, data=bytes(4) + wanted),
    )  # fmt: skip
    packet.extension_hdrs = {}
    return ether(packet, dpkt.ethernet.ETH_TYPE_IP6, src, "33:33:ff:" + wanted[13:].hex(":"))


@pytest.mark.parametrize("sender", [A_MAC, "52:54:00:00:00:99"])
def test_a_flood_of_flows_hides_nothing_between_known_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sender: str
) -> None:
    monkeypatch.setattr(flows, "MAX_FLOWS", 50)
    flood = [(1 + i / 1e4, solicitation(i, sender)) for i in range(300)]
    hidden = [
        (5, forth(4000, SYN)), (5.1, back(4000, SYN_ACK)), (6, forth(4000, ACK, b"x" * 1000)),
        (7, forth(4001, SYN)), (8, forth(4001, SYN)),
        (9, ether(b"y" * 500, 0x88B5)),
        (9, tcp4("192.0.2.1", "10.77.0.21", 1, 2, ACK, b"z" * 100, src="52:54:00:00:00:97", dst="52:54:00:00:00:98")),
    ]  # fmt: skip
    (traffic,) = read(capture(tmp_path / "c", [*flood, *hidden]), [ALL], KNOWN)
    assert traffic.overflow
    assert len(traffic.flows) < 60
    assert {f.proto: (f.packets, f.payload) for f in between(traffic, A, B)} == {
        "tcp": (4, 1000), "other": (1, 500),
    }  # fmt: skip
    assert sum(f.payload for f in traffic.flows if B.received(f)) == 1600
    assert unanswered(traffic, A, B) == 2
    assert sum(f.packets for f in traffic.flows) == traffic.packets == 307
    assert sum(f.packets for f in traffic.flows if f.to_many) == 300
    assert packets_between(tmp_path / "c", A, B, ALL) == 5


def test_few_flows_are_no_overflow(tmp_path: Path) -> None:
    (traffic,) = read(capture(tmp_path / "c", [(1, forth(4000, SYN))]), [ALL], KNOWN)
    assert not traffic.overflow


def test_folded_flows_are_few_whatever_is_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MAX_FLOWS", 10)
    rng = random.Random(5)
    packets = [(i, rng.randbytes(12) + bytes((0x60 + i % 16, i % 256)) + b"x" * 50) for i in range(2000)]
    (traffic,) = read(capture(tmp_path / "c", packets), [ALL], KNOWN)
    assert len(traffic.flows) <= 10 + 2 * 3
    assert traffic.packets == 2000


def test_bytes_behind_the_admitted_length_are_payload(tmp_path: Path) -> None:
    short = dpkt.ip.IP(src=socket.inet_aton("10.77.0.11"), dst=socket.inet_aton("10.77.0.21"), p=17)
    short.data = dpkt.udp.UDP(sport=1, dport=2, ulen=8)
    short.len = 28
    plain = ether(bytes(short), dpkt.ethernet.ETH_TYPE_IP)
    lies, padded = plain + b"x" * 1000, plain + b"\0" * 18
    broken = raw(B_MAC) + raw(A_MAC) + b"\x08\x00" + b"\0" * 700
    (traffic,) = read(capture(tmp_path / "c", [(1, lies), (2, padded), (3, broken)]), [ALL], KNOWN)
    assert len(padded) == 60
    assert sorted((f.proto, f.payload) for f in traffic.flows) == [("ether-0800", 700), ("udp", 982)]


@given(st.binary(max_size=200))
def test_no_bytes_make_the_dissection_raise(content: bytes) -> None:
    assert dissect_packet(content).payload >= 0


def test_damaged_real_packets_never_raise() -> None:
    rng = random.Random(7)
    originals = [
        forth(4000, SYN, b"x" * 100),
        v6(6, dpkt.tcp.TCP()),
        v6(0, b"\x06\x00" * 30),
        v6(44, b"\0" * 40),
    ]
    for _ in range(5000):
        content = bytearray(rng.choice(originals))
        for _ in range(rng.randrange(1, 12)):
            content[rng.randrange(12, len(content))] = rng.randrange(256)
        facts = dissect_packet(bytes(content[: rng.randrange(len(content)) + 1]))
        assert facts.payload >= 0


def test_ip_in_ip_that_nests_for_ever_is_only_one_packet(tmp_path: Path) -> None:
    inner = b""
    for _ in range(9):
        packet = dpkt.ip.IP(
            src=socket.inet_aton("10.77.0.11"), dst=socket.inet_aton("10.77.0.21"), p=4, data=inner
        )
        packet.len = 20 + len(inner)
        inner = bytes(packet)
    (traffic,) = read(capture(tmp_path / "c", [(1, ether(inner, dpkt.ethernet.ETH_TYPE_IP))]), [ALL], KNOWN)
    assert [(f.proto, f.packets) for f in traffic.flows] == [("ip-4", 1)]
    assert io.BytesIO(inner).read(1) == b"E"
