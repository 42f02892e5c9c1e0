"""What a process that runs machines holds, counted from outside of it, and what of it grew."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

from appliance.host.capacity import sample_process
from appliance.host.clock import wait_until
from appliance.host.paths import Paths

_SAME, _QUIET_S = 5, 120.0
# What may grow: a share of the first count and an amount on top. Whatever is not named here may not at all.
SLACK: Mapping[str, tuple[float, int]] = {
    "resident MB": (0.10, 0),
    "own MB": (0.10, 0),
    "threads": (0.0, 1),
    # The write-ahead logs of ledger and index: SQLite goes back to the beginning of one after 1000 pages of 4 KiB.
    "disk kB": (0.0, 2 * 4200),
}


def rows_of_another(paths: Paths) -> int:
    """Rows of a ledger that another process holds.

    In one that holds it itself, SQLite would keep the descriptors of this look: to close one would give up the locks
    of all (https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled).
    """
    with contextlib.closing(sqlite3.connect(f"file:{paths.ledger}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM things").fetchone()[0])


def holdings(pid: int, paths: Paths, rows: Callable[[Paths], int] = rows_of_another) -> dict[str, int]:
    """What process ``pid`` and the home of ``paths`` hold now; ``rows`` counts its ledger's."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
    interfaces = [line.split(":")[0].strip() for line in (proc / "net" / "dev").read_text().splitlines()[2:]]
    return {
        "resident MB": int(status["VmRSS"].split()[0]) // 1000,
        "own MB": own_mb(pid),
        "descriptors": len(list((proc / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "child processes": children_of(pid),
        "QEMU processes": len(machines_of(paths)),
        "interfaces": len(interfaces),
        "taps": sum(1 for name in interfaces if name.startswith("hct")),
        "files of cells": sum(1 for _ in paths.cells.rglob("*")),
        "open trials": len(list(paths.open_trials.iterdir())),
        "ledger rows": rows(paths),
        "disk kB": used_bytes(paths.home, (paths.baselines, paths.bundles)) // 1000,
    }


def quiet_holdings(pid: int, paths: Paths, rows: Callable[[Paths], int] = rows_of_another) -> dict[str, int]:
    """As :func:`holdings`, once machines and rows stay the same: what ended or stands by does so later."""
    seen: list[tuple[int, ...]] = []

    def quiet() -> bool:
        now = holdings(pid, paths, rows)
        seen.append(tuple(now[k] for k in ("QEMU processes", "taps", "ledger rows", "child processes")))
        return len(seen) > _SAME and len(set(seen[-_SAME:])) == 1

    wait_until(quiet, _QUIET_S, "the machines in the background to stay the same", interval=1)
    return holdings(pid, paths, rows)


def own_mb(pid: int) -> int:
    """Memory of a process's own, MB; 0 if it is gone."""
    sample = sample_process(pid)
    return sample.own // 1_000_000 if sample else 0


def children_of(pid: int) -> int:
    """Child processes of ``pid``, zombies too."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(len((t / "children").read_text().split()) for t in threads)


def machines_of(paths: Paths) -> list[int]:
    """QEMU processes of a home."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
        except OSError:
            continue
        if b"qemu-system" in line.split(b"\0")[0] and os.fsencode(paths.home) in line:
            found.append(int(entry.name))
    return found


def used_bytes(folder: Path, without: tuple[Path, ...] = ()) -> int:
    """Bytes that the files below ``folder`` occupy; folders in ``without`` are left out."""
    total = 0
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if Path(root, f) not in without]
        for name in files:
            try:
                total += Path(root, name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def grown(
    first: Mapping[str, int], last: Mapping[str, int], slack: Mapping[str, tuple[float, int]] = SLACK
) -> list[str]:
    """Names of what exceeds its first count by more than its slack. Pure."""
    found = []
    for name, value in first.items():
        share, amount = slack.get(name, (0.0, 0))
        if last[name] > value * (1 + share) + amount:
            found.append(name)
    return found
