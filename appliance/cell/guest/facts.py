"""Print what tells one state of this machine from another, then make it an incarnation of its own: clock,
random generator, sentinels.

Runs in the guest: ``python3 -I - INCARNATION NOW SEED``. INCARNATION is "" when a baseline is being recorded;
SEED is random bytes of the host in hexadecimal: two clones of one baseline would otherwise draw the same
"random" keys and ports. With ``--wait`` the script is saved inside a baseline, already started: it waits for
one line with the three arguments on PORT and answers there with the line that it would have printed. With a fourth
word, "stay", it then waits for one more line, the time at which a machine that stood by was woken: it sets the
clock, repeats the line, and ends. That spares every restored machine the start of an interpreter.
"""

import fcntl
import json
import os
import struct
import sys
import time

RAM = "/dev/shm/hotcell-sentinel"
DISK = "/var/lib/hotcell-sentinel"
PORT = "/dev/virtio-ports/org.hotcell.proof"
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h


def read(path: str, limit: int = 512) -> str:
    """The start of a file, "" without one. Not by ``open``, whose layers are all translated anew under TCG."""
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            return os.read(file, limit).decode(errors="replace")
        finally:
            os.close(file)
    except OSError:
        return ""


def processes(*, all_of_us: bool) -> list[str]:
    found: dict[int, str] = {}
    parents: dict[int, int] = {}
    # Left out: kernel threads (they come and go). One read spares those of two in three processes.
    kernel = {"2", *read("/proc/2/task/2/children", 1 << 16).split()}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if pid in kernel:
            continue
        name, _, rest = read(f"/proc/{pid}/stat").rpartition(")")
        fields = rest.split(None, 20)
        if not fields:  # it has ended since
            continue
        parents[int(pid)] = int(fields[1])
        found[int(pid)] = f"{name.partition('(')[2]} {pid} {fields[19]}"
    # Left out too: this script, and what the guest agent forked for it.
    own: set[int] = set()
    current = 0 if all_of_us else os.getpid()
    while current in parents and not found[current].startswith("qemu-ga "):
        own.add(current)
        current = parents[current]
    return sorted(v for k, v in found.items() if k not in own and parents[k] != 2)


def reseed(seed: bytes) -> bool:
    """Mix ``seed`` into the kernel's random generator and make it draw on that from now on; random(4)."""
    try:
        pool = os.open("/dev/urandom", os.O_WRONLY)
        try:
            fcntl.ioctl(pool, RNDADDENTROPY, struct.pack(f"ii{len(seed)}s", 8 * len(seed), len(seed), seed))
            fcntl.ioctl(pool, RNDRESEEDCRNG)
        finally:
            os.close(pool)
    except OSError:
        return False
    return True


def plant(incarnation: str) -> None:
    """Put the sentinels in place; they are in the files at once, and on the disk itself a little later."""
    for path in (RAM, DISK):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(file, incarnation.encode())
        finally:
            os.close(file)


def look(*, waited: bool) -> dict[str, object]:
    """What changes nothing."""
    return {
        "boot_id": read("/proc/sys/kernel/random/boot_id").strip(),
        "nonce": read("/run/hotcell-baseline"),
        "ram_sentinel": read(RAM),
        "disk_sentinel": read(DISK),
        "processes": processes(all_of_us=waited),
    }


def tell(incarnation: str, now: float, seed: bytes, *, waited: bool) -> str:
    began = time.monotonic()
    facts = {**look(waited=waited), "reseeded": reseed(seed)}
    # Not before: a leap of days may start what waits for a date, and it would be in the list.
    time.clock_settime(time.CLOCK_REALTIME, now + time.monotonic() - began)
    if incarnation:
        plant(incarnation)
    return json.dumps(facts)


def asked(port: int) -> list[str]:
    """The words of the host's next line. While the host's end is closed, reading does not wait."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(port, 4096)
        line += piece
        if not piece:
            time.sleep(0.1)
    return line.decode().split()


def answer(port: int, text: str) -> None:
    """One line; the port takes 32 KiB at a time."""
    line = f"{text}\n".encode()
    while line:
        line = line[os.write(port, line) :]


def wait() -> None:
    port = os.open(PORT, os.O_RDWR)
    json.dumps(look(waited=True))  # what answering needs is then in the baseline's memory and caches
    incarnation, now, seed, *stay = asked(port)
    answer(port, tell(incarnation, float(now), bytes.fromhex(seed), waited=True))
    if stay:
        (now,) = asked(port)
        time.clock_settime(time.CLOCK_REALTIME, float(now))
        answer(port, now)
    os.close(port)
    os.sync()  # after the answers: it takes as long as all before


if sys.argv[1] == "--wait":
    wait()
else:
    print(tell(sys.argv[1], float(sys.argv[2]), bytes.fromhex(sys.argv[3]), waited=False))
    os.sync()
