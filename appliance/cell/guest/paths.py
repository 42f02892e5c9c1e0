"""Try every way out of this machine, each negative beside a positive twin. Prints one JSON object.

Runs in the guest as root: ``python3 -I - QUESTION``. The twins run first and say how fast this network is. Then
all negatives run side by side, each for many times as long as the slowest twin took.
"""

import concurrent.futures
import fcntl
import json
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future

# Seconds that a negative waits for an answer that must not come. At least one SYN is sent again (RFC 6298: after
# 1 s), and far away is not farther than many times the segment's own round trip.
LEAST, MOST, TIMES = 2.0, 4.0, 10.0
ROUNDS = 3
PATIENCE = 4 * MOST  # for a job; the sweeps have rounds, and get twice as long
ESTABLISHED, CLOSE_WAIT = 1, 8  # include/net/tcp_states.h
question = json.loads(sys.argv[1])


def word(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, OSError) and error.errno in (101, 113, 99, 97, 11, 110):
        return "timeout" if error.errno in (11, 110) else "unreachable"
    return f"error {type(error).__name__} {error}"[:150]


def tcp(family: socket.AddressFamily, address: str, port: int, wait: float) -> str:
    """Whether somebody takes a connection, as the kernel's own state of the socket says.

    connect() with a time limit also returns well if the attempt ended between its wait and its look for an
    error (a busy guest did that once in some hundred preflights); such an attempt is repeated.
    """
    state = 0
    for _ in range(ROUNDS):
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.settimeout(wait)
            try:
                s.connect((address, port))
                state = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            except OSError as e:
                return word(e)
            if state in (ESTABLISHED, CLOSE_WAIT):
                return f"open state {state}"
    return f"error connected, and in state {state}"


def udp(address: str, payload: bytes, wait: float) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(wait)
        try:
            s.connect((address, 53))
            s.send(payload)
            s.recv(512)
        except OSError as e:
            return word(e)
        return "answered"


def query(name: str) -> bytes:
    labels = b"".join(bytes([len(x)]) + x for x in name.encode().split(b"."))
    return struct.pack(">HHHHHH", 0x4843, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def resolve(wait: float) -> str:
    """Who resolves a name that only the outside could know: all of them, since one may be our own world."""
    try:
        with open("/etc/resolv.conf") as f:
            servers = [x.split()[1] for x in f if x.startswith("nameserver")]
    except OSError:
        return "unreachable"
    answered = []
    for server in servers:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(wait)
            try:
                s.connect((server, 53))
                s.send(query("example.com"))
                answer = s.recv(512)
            except OSError:
                continue
            if len(answer) >= 12 and answer[3] & 15 == 0 and struct.unpack(">H", answer[6:8])[0] > 0:
                answered.append(server)
    return ("answered by " + " ".join(answered))[:150] if answered else "none"


def own_mac(interface: str = "eth0") -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        return fcntl.ioctl(s, 0x8927, struct.pack("256s", interface.encode()))[18:24]


def arp(wait: float) -> set[str]:
    """Ask the whole segment who is there, up to three times until every known peer has answered."""
    mac, segment = own_mac(), question["segment"]
    own = next(a for a in (f"{segment}.{n}" for n in range(1, 255)) if is_own(a))
    head = b"\xff" * 6 + mac + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1)
    head += mac + socket.inet_aton(own) + b"\0" * 6
    found: set[str] = set()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as s:
        # The peers sweep at the same time: with the default buffer their questions push our answers out.
        s.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        s.bind(("eth0", 0x0806))
        for _ in range(ROUNDS):
            for n in range(1, 255):
                s.send(head + socket.inet_aton(f"{segment}.{n}"))
            listen(s, wait, lambda: found.update(arp_answer(s.recv(128))))
            if found >= set(question["peers"]):
                break
    return found


def arp_answer(packet: bytes) -> set[str]:
    """Who answers in an ARP packet; nobody if it is a question."""
    return {socket.inet_ntoa(packet[28:32])} if packet[20:22] == b"\0\2" else set()


def listen(s: socket.socket, wait: float, take: Callable[[], None]) -> None:
    """Call ``take`` for what arrives within the wait."""
    end = time.monotonic() + wait
    while (left := end - time.monotonic()) > 0:
        if select.select([s], [], [], left)[0]:
            take()


def is_own(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.bind((address, 0))
        except OSError:
            return False
        return True


def link_local(mac_end: int) -> str:
    """Link-local address that a machine of ours makes of its MAC 52:54:00:77:00:xx (RFC 4291, EUI-64)."""
    return f"fe80::5054:ff:fe77:{mac_end:x}"


def neighbours(wait: float) -> set[str]:
    """All nodes of the link that answer an echo to ff02::1, asked like the segment."""
    found: set[str] = set()

    def take() -> None:
        packet, sender = s.recvfrom(2048)
        if packet[:1] == b"\x81":
            found.add(sender[0].partition("%")[0])

    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as s:
        index = socket.if_nametoindex("eth0")
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        for i in range(ROUNDS):
            s.sendto(struct.pack(">BBHHH", 128, 0, 0, 0x4843, i), ("ff02::1", 0, 0, index))
            listen(s, wait, take)
            if len(found) > len(question["peers"]):  # the peers, and this machine itself
                break
    return found


def strangers(found: set[str], known: set[str], own: set[str]) -> str:
    odd = sorted(found - known - own)
    return ("answered by " + " ".join(odd))[:150] if odd else "none"


def peers_seen(found: set[str], known: set[str]) -> str:
    return f"answered {len(found & known)}" if known and found & known else "none"


def outcomes(jobs: dict[str, Future[str]]) -> dict[str, str]:
    found = {}
    for name, job in jobs.items():
        try:
            found[name] = job.result(PATIENCE)
        except Exception as e:
            found[name] = word(e)
    return found


def twins(peer4: str, peer6: str) -> tuple[dict[str, str], float]:
    """What works on this segment, and the seconds that the slowest of it took."""
    began = time.monotonic()
    # A peer's closed UDP port answers with ICMP, which shows that UDP gets there and back.
    jobs = {
        "tcp4-peer": pool.submit(tcp, socket.AF_INET, peer4, 22, MOST),
        "tcp6-peer": pool.submit(tcp, socket.AF_INET6, peer6, 22, MOST),
        "udp-peer": pool.submit(udp, peer4, query("hotcell.invalid"), MOST),
    }
    return outcomes(jobs), time.monotonic() - began


pool = concurrent.futures.ThreadPoolExecutor(16)
results, slowest = twins(question["peers"][0], question["peers6"][0]) if question["peers"] else ({}, MOST)
wait = min(MOST, max(LEAST, TIMES * slowest))
arp_job, nd_job = pool.submit(arp, wait), pool.submit(neighbours, wait)
jobs = {
    "tcp4-outside": pool.submit(tcp, socket.AF_INET, question["outside4"], 80, wait),
    "tcp6-outside": pool.submit(tcp, socket.AF_INET6, question["outside6"], 80, wait),
    "udp-outside": pool.submit(udp, question["outside4"], query("example.com"), wait),
    "resolve-outside": pool.submit(resolve, wait),
    **{
        f"tcp4-metadata-{i}": pool.submit(tcp, socket.AF_INET, a, 80, wait)
        for i, a in enumerate(question["metadata"])
    },
}
results |= outcomes(jobs)
known4 = set(question["peers"])
known6 = {link_local(int(a.rsplit(".", 1)[1])) for a in known4}
own6 = {link_local(own_mac()[5])}
try:
    found = arp_job.result(2 * PATIENCE)
    results["arp-strangers"] = strangers(found, known4, set())
    results["arp-peers"] = peers_seen(found, known4)
except Exception as e:
    results["arp-strangers"] = results["arp-peers"] = word(e)
try:
    found = nd_job.result(2 * PATIENCE)
    results["nd-strangers"] = strangers(found, known6, own6)
    results["nd-peers"] = peers_seen(found, known6)
except Exception as e:
    results["nd-strangers"] = results["nd-peers"] = word(e)
print(json.dumps({"results": results}))
