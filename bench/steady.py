"""Twenty claimer trials in a row through one server: nothing may grow.

Run as root: ``.venv/bin/python -m bench.steady [TRIALS]``. Prints, after the first trial and after the last, what
the server holds: memory, descriptors, threads, processes, interfaces, files, ledger rows; and the seconds of each
trial. Uses the home that ``HOTCELL_HOME`` names, with a server of its own.
"""

from __future__ import annotations

import sys
import time

from appliance.host.paths import default_paths
from bench.common.holdings import grown, quiet_holdings
from bench.common.server import run_trial, running_server
from bench.common.stats import summary
from bench.common.table import show


def main(count: int) -> int:
    """Run ``count`` trials; 0 if nothing grew and each scored what a claimer deserves."""
    paths = default_paths().make()
    seconds: list[float] = []
    wrong = 0
    with running_server(paths) as server:
        for n in range(count):
            began = time.monotonic()
            trial = run_trial(server.client, "claimer", n)
            seconds.append(time.monotonic() - began)
            wrong += trial.state != "sealed" or trial.highest not in (None, 0)
            if n == 0:
                first = quiet_holdings(server.pid, paths)
            print(f"{n + 1:3} {trial.state} highest={trial.highest} {seconds[-1]:.1f} s", flush=True)
        last = quiet_holdings(server.pid, paths)
    print()
    show(("held by the server", "after 1", f"after {count}"), ((k, v, last[k]) for k, v in first.items()))
    rest = summary(seconds[1:] or seconds)
    print(f"\nseconds a trial: first {seconds[0]:.1f}, later median {rest.p50:.1f}, worst {rest.worst:.1f}")
    found = grown(first, last)
    print(f"wrong scores: {wrong}; grown: {', '.join(found) or 'nothing'}")
    return 1 if wrong or found else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
