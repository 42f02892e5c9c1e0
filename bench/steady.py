"""Twenty claimer trials in a row through one server: nothing may grow.

Run as root: ``.venv/bin/python -m bench.steady [TRIALS]``. Prints, after the first trial and after the last, what
the server holds: memory, descriptors, threads, processes, interfaces, files, ledger rows; and the seconds of each
trial. Uses the home that ``HOTCELL_HOME`` names, with a server of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from appliance.cli.client import Client, connect
from appliance.host.clock import wait_until
from appliance.host.paths import Paths, default_paths
from appliance.service import TrialRequest, TrialView


def holdings(pid: int, paths: Paths) -> dict[str, int]:
    """What a server holds now, counted from outside of it."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
    interfaces = (proc / "net" / "dev").read_text().splitlines()[2:]
    with sqlite3.connect(f"file:{paths.ledger}?mode=ro", uri=True) as db:
        rows = db.execute("SELECT count(*) FROM things").fetchone()[0]
    return {
        "resident MB": int(status["VmRSS"].split()[0]) // 1000,
        "descriptors": len(list((proc / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "QEMU processes": len(machines_of(paths)),
        "interfaces": len(interfaces),
        "files of cells": sum(1 for _ in paths.cells.rglob("*")),
        "open trials": len(list(paths.open_trials.iterdir())),
        "ledger rows": rows,
    }


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


def one_trial(client: Client, n: int) -> TrialView:
    """Run one claimer to its end."""
    trial = client.post(TrialView, "trials", TrialRequest(subject="claimer", seed=n))
    while not trial.state.ended:
        time.sleep(0.5)
        trial = client.get(TrialView, f"trials/{trial.id}")
    return trial


def main(count: int) -> int:
    """Run ``count`` trials; 0 if nothing grew and each scored what a claimer deserves."""
    paths = default_paths().make()
    server = subprocess.Popen([sys.executable, "-m", "appliance.cli", "serve", "--port", "0"])
    try:
        wait_until(paths.server_file.exists, 60, "the server to serve")
        pid = int(json.loads(paths.server_file.read_text())["pid"])
        seconds: list[float] = []
        wrong = 0
        with connect(paths, None, None) as client:
            for n in range(count):
                began = time.monotonic()
                trial = one_trial(client, n)
                seconds.append(time.monotonic() - began)
                wrong += trial.state != "sealed" or trial.highest not in (None, 0)
                if n == 0:
                    first = holdings(pid, paths)
                print(f"{n + 1:3} {trial.state} highest={trial.highest} {seconds[-1]:.1f} s", flush=True)
            last = holdings(pid, paths)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(90)
    print(f"\n{'held by the server':20} {'after 1':>9} {f'after {count}':>9}")
    for name, value in first.items():
        print(f"{name:20} {value:9} {last[name]:9}")
    rest = sorted(seconds[1:]) or seconds
    print(
        f"\nseconds a trial: first {seconds[0]:.1f}, later median {rest[len(rest) // 2]:.1f}, worst {rest[-1]:.1f}"
    )
    grown = [k for k in first if last[k] > first[k] * (1.1 if k == "resident MB" else 1) + (k == "threads")]
    print(f"wrong scores: {wrong}; grown: {', '.join(grown) or 'nothing'}")
    return 1 if wrong or grown else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
