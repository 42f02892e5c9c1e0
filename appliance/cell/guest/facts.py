"""Print what tells one state of this machine from another, then make it an incarnation of its own: clock,
random generator, sentinels.

Runs in the guest: ``python3 -I - INCARNATION NOW SEED``. INCARNATION is "" when a baseline is being recorded;
SEED is random bytes of the host in hexadecimal: two clones of one baseline would otherwise draw the same
"random" keys and ports. With ``--wait`` the script is saved inside a baseline, already started: it waits for
one line with the three arguments in the pipe ASK, writes to ANSWER what it would have printed, and ends.
That spares every restored machine the start of an interpreter.
"""

import fcntl
import json
import os
import struct
import sys
import time

RAM = "/dev/shm/hotcell-sentinel"
DISK = "/var/lib/hotcell-sentinel"
ASK, ANSWER = "/run/hotcell-ask", "/run/hotcell-answer"
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h


def read(path: str) -> str:
    try:
        with open(path) as f:
            return f.read(256)
    except OSError:
        return ""


def processes(*, all_of_us: bool) -> list[str]:
    found: dict[int, str] = {}
    parents: dict[int, int] = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as f:
                name, _, rest = f.read().rpartition(")")
        except OSError:
            continue
        fields = rest.split()
        parents[int(pid)] = int(fields[1])
        found[int(pid)] = f"{name.partition('(')[2]} {pid} {fields[19]}"
    # Left out: kernel threads (they come and go), this script, and what the guest agent forked for it.
    own: set[int] = set()
    current = 0 if all_of_us else os.getpid()
    while current in parents and not found[current].startswith("qemu-ga "):
        own.add(current)
        current = parents[current]
    return sorted(v for k, v in found.items() if k not in own and k != 2 and parents[k] != 2)


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


def tell(incarnation: str, now: float, seed: bytes, *, waited: bool) -> str:
    facts = {
        "boot_id": read("/proc/sys/kernel/random/boot_id").strip(),
        "nonce": read("/run/hotcell-baseline"),
        "ram_sentinel": read(RAM),
        "disk_sentinel": read(DISK),
        "processes": processes(all_of_us=waited),
        "reseeded": reseed(seed),
    }
    time.clock_settime(time.CLOCK_REALTIME, now)
    if incarnation:
        for path in (RAM, DISK):
            with open(path, "w") as f:
                f.write(incarnation)
                f.flush()
                os.fsync(f.fileno())
    return json.dumps(facts)


if sys.argv[1] == "--wait":
    os.umask(0o077)
    for old in (ASK, ANSWER):  # of the baseline below this one
        if os.path.lexists(old):
            os.unlink(old)
    os.mkfifo(ASK)
    with open(ASK) as ask:  # until somebody writes
        incarnation, now, seed = ask.readline().split()
    answer = tell(incarnation, float(now), bytes.fromhex(seed), waited=True)
    with open(ANSWER + ".part", "w") as out:
        out.write(answer)
    os.rename(ANSWER + ".part", ANSWER)
    os.unlink(ASK)
else:
    print(tell(sys.argv[1], float(sys.argv[2]), bytes.fromhex(sys.argv[3]), waited=False))
