"""Five hundred resets of one cell in a row: none may fail, and nothing may grow.

As root: ``.venv/bin/python -m bench.soak``, in the home that ``HOTCELL_HOME`` names. Compares what this process
and its home hold after the twentieth reset and after the last, both times once the background is quiet. With
``--wait`` every reset finds its standby; without, it takes one if it is ready and restores directly if not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from appliance.cell.baseline import Baseline
from appliance.cell.cell import Cell
from appliance.cell.ledger import Kind
from appliance.cell.standby import StandbyPool
from appliance.errors import HotcellError, LabError
from appliance.host.clock import wait_until
from bench.common.holdings import grown, own_mb, quiet_holdings
from bench.common.rig import MACHINES, Rig, sealed_rig
from bench.common.stats import independent, summary
from bench.common.table import seconds, show

_QUIET_S = 120.0
_EDGE = 50  # resets that the two ends of a series have, and that lie between two looks at its memory


class Soak(NamedTuple):
    """What a series of resets showed. ``ways`` counts machines by how they came."""

    took: list[float]
    ways: Counter[str]
    failures: list[str]
    first: dict[str, int]
    last: dict[str, int]
    own: list[int]  # MB, after every fiftieth


def soak(rig: Rig, baselines: Sequence[Baseline], count: int, settled: int, *, wait: bool) -> Soak:
    """Reset all machines of one cell together, ``count`` times."""
    pool = rig.pool
    cell = Cell("soak", rig.shop, pool)
    took: list[float] = []
    ways: Counter[str] = Counter()
    failures: list[str] = []
    first: dict[str, int] = {}
    own: list[int] = []
    try:
        cell.open()
        cell.restore_all(baselines, lambda _p: None)
        cell.plug_all()
        pool.keep(cell.id, baselines)
        for n in range(count):
            if wait:
                pool.wait_ready(_QUIET_S)
            began = time.monotonic()
            try:
                ways.update(_reset(cell, baselines))
            except HotcellError as e:
                failures.append(f"reset {n + 1}: {e}")
                print(f"FAILED {failures[-1]}", flush=True)
            took.append(time.monotonic() - began)
            rig.door.events.clear()
            if n + 1 == settled:
                first = _quiet_holdings(rig, cell, pool, len(baselines))
            if n % _EDGE == _EDGE - 1:
                own.append(own_mb(os.getpid()))
                print(f"{n + 1} resets, {len(failures)} failed, {own[-1]} MB of own memory", flush=True)
        return Soak(took, ways, failures, first, _quiet_holdings(rig, cell, pool, len(baselines)), own)
    finally:
        cell.close()


def _reset(cell: Cell, baselines: Sequence[Baseline]) -> list[str]:
    """One reset of the group; how each machine came.

    Raises:
        LabError: a machine is not what a reset promises.
    """
    found = []
    for renewal in cell.reset(baselines, lambda _p: None):
        if renewal.withheld or not renewal.proof.proved:
            raise LabError(f"{renewal.machine.name}: {len(renewal.withheld)} machines were withheld")
        if not renewal.machine.plugged or not renewal.machine.qga.ping():
            raise LabError(f"{renewal.machine.name} is not plugged in, or does not answer")
        found.append("direct" if renewal.direct_because else "standby")
    return found


def _quiet_holdings(rig: Rig, cell: Cell, pool: StandbyPool, machines: int) -> dict[str, int]:
    """What is held once every predecessor is gone and every standby is there."""

    def alone() -> bool:
        return len(rig.shop.ledger.things(Kind.FOLDER, owner=cell.id)) == machines

    wait_until(alone, _QUIET_S, "the predecessors to be gone", interval=0.1)
    if not pool.wait_ready(_QUIET_S):
        raise LabError(f"no standby came: {pool.missing()}")
    return quiet_holdings(os.getpid(), rig.paths, lambda _paths: len(rig.shop.ledger.things()))


def report(found: Soak, settled: int) -> int:
    """Print what was found; 0 if nothing failed, nothing grew, and the last resets were as quick as the first."""
    count = len(found.took)
    print()
    show(
        ("held", f"after {settled}", f"after {count}"),
        ((k, v, found.last[k]) for k, v in found.first.items()),
    )
    print(f"\nown MB after every {_EDGE}: {' '.join(map(str, found.own))}")
    s = summary(found.took)
    early, late = summary(found.took[:_EDGE]).p50, summary(found.took[-_EDGE:]).p50
    print(f"\nmachines by way: {', '.join(f'{way} {n}' for way, n in sorted(found.ways.items()))}")
    print(
        f"seconds a reset, until the call returned: p50 {seconds(s.p50)}, p99 {seconds(s.p99)}, "
        f"max {seconds(s.worst)}; median of the first {_EDGE} {seconds(early)}, of the last {seconds(late)}"
    )
    more = grown(found.first, found.last)
    slower = not independent(early, late, share=0.5, slack=0.05)
    print(
        f"{count} resets, failures: {len(found.failures)}; grown: {', '.join(more) or 'nothing'}"
        f"{'; SLOWER towards the end' if slower else ''}"
    )
    return 1 if found.failures or more or slower else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run, report."""
    parser = argparse.ArgumentParser(prog="bench.soak", description=__doc__)
    kinds = "; ".join(f"{k}: {v}" for k, v in MACHINES.items())
    parser.add_argument("--machines", default="idle", help=f"comma-separated, reset as one group; {kinds}")
    parser.add_argument("--n", type=int, default=500, help="resets (default 500)")
    parser.add_argument("--settled", type=int, default=20, help="compare with what is held after this one")
    parser.add_argument("--wait", action="store_true", help="wait for the standbys before each reset")
    args = parser.parse_args(argv)
    if not 0 < args.settled < args.n:
        parser.error("--settled must lie between 0 and --n")
    with sealed_rig() as rig:
        baselines = list(rig.baselines(args.machines.split(",")).values())
        found = soak(rig, baselines, args.n, args.settled, wait=args.wait)
    return report(found, args.settled)


if __name__ == "__main__":
    sys.exit(main())
