"""Ways back to a clean machine side by side in one run: cold boot, internal revert, direct restore, standby.

As root: ``.venv/bin/python -m bench.reset``, in the home that ``HOTCELL_HOME`` names. The order is random, so
that all ways share the host's drift; while one is measured, the machines of the others are paused. A time is
from the request until the guest answers through its agent *and* is plugged into its segment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from appliance.errors import HotcellError
from bench.common.resets import (
    COLD,
    DIRECT,
    INTERNAL,
    STANDBY,
    WAYS,
    Case,
    Reset,
    aims,
    breakdown,
    ratio,
    ready,
    schedule,
    wanted,
)
from bench.common.rig import MACHINES, Rig, dirty, room_mib, sealed_rig
from bench.common.stats import Summary, summary
from bench.common.table import seconds, show
from bench.common.ways import Reverted, Way, make_way


class Run(NamedTuple):
    """All that was measured; ``failed`` are resets that did not work, in words.

    A way of ``broken`` is not asked again: what it would show then is its failure's aftermath.
    """

    results: dict[Case, list[Reset]]
    background: dict[Case, list[float]]
    failed: list[str]
    broken: set[tuple[str, str]]


def measure(rig: Rig, counts: dict[Case, int], seed: int) -> Run:
    """Set every way up, then take the cases in random order."""
    run = Run({case: [] for case in counts}, {case: [] for case in counts}, [], set())
    baselines = rig.baselines(list(dict.fromkeys(case.kind for case in counts)))
    ways: dict[tuple[str, str], Way] = {}
    try:
        for number, (kind, name) in enumerate(dict.fromkeys((c.kind, c.way) for c in counts)):
            began = time.monotonic()
            way = ways[kind, name] = make_way(name, rig, baselines[kind], f"bench{number}")
            note = f", of it {way.made_s:.1f} s to boot and warm" if isinstance(way, Reverted) else ""
            print(f"set up {name}, {kind}: {time.monotonic() - began:.1f} s{note}", flush=True)
        order = schedule(_that_fit(counts, ways), seed)
        for n, case in enumerate(order):
            if (case.kind, case.way) not in run.broken:
                _take(ways[case.kind, case.way], case, run)
            if n % 20 == 19:
                print(f"{n + 1} of {len(order)} taken", flush=True)
    finally:
        for way in ways.values():
            way.close()
    return run


def _that_fit(counts: dict[Case, int], ways: dict[tuple[str, str], Way]) -> dict[Case, int]:
    """Cases whose dirt the guest's disk takes; the others are named and left out."""
    fit: dict[Case, int] = {}
    for (kind, name), way in ways.items():
        mine = {c: n for c, n in counts.items() if (c.kind, c.way) == (kind, name)}
        if any(c.dirt for c in mine):
            room = room_mib(way.wake())
            way.rest()
            for case in [c for c in mine if c.dirt > room]:
                print(f"left out: {_words(case)}; the guest's disk has room for {room} MiB")
                del mine[case]
        fit |= mine
    return fit


def _take(way: Way, case: Case, run: Run) -> None:
    """One reset, and what it left to do in the background."""
    try:
        if case.way != COLD:
            dirty(way.wake(), case.dirt)
        run.results[case].append(way.reset())
        run.background[case].append(way.rest())
    except (HotcellError, ValueError) as e:
        run.failed.append(f"{_words(case)}: {e}")
        run.broken.add((case.kind, case.way))
        print(f"FAILED {run.failed[-1]}", flush=True)


def _words(case: Case) -> str:
    return f"{case.way}, {case.kind}, {case.dirt} MiB"


def print_run(run: Run) -> None:
    """The tables."""
    found = {case: resets for case, resets in run.results.items() if resets}
    print("\nSeconds from request to an answering, plugged guest\n")
    rows = []
    for case, resets in sorted(found.items()):
        s = ready(resets)
        against = [ratio(found, case, other) for other in (STANDBY, DIRECT)]
        rows.append(
            (case.kind, case.way, case.dirt, s.n, *map(seconds, s[1:5]),
             *("-" if r is None else f"{r:.3g}" for r in against),
             seconds(summary([r.steps.returned for r in resets]).p50),
             seconds(summary(run.background[case] or [0.0]).p50)),
        )  # fmt: skip
    columns = (
        "machine", "way", "MiB dirtied", "n", "p50", "p90", "p99", "max", "x standby", "x direct",
        "call returns p50", "quiet again p50",
    )  # fmt: skip
    show(columns, rows, text_columns=2)
    _print_steps(found)
    print("\nMemory of a machine before it does work, MB\n")
    show(
        ("machine", "way", "own p50", "own max", "with files of its own (USS) p50"),
        [
            (kind, way, f"{own.p50:.0f}", f"{own.worst:.0f}", f"{unique.p50:.0f}")
            for (kind, way), own, unique in _memory(found)
        ],
        text_columns=2,
    )


def _print_steps(found: dict[Case, list[Reset]]) -> None:
    print("\nSeconds of each step at 0 MiB, median and worst\n")
    rows = [
        (case.kind, case.way, step, seconds(s.p50), seconds(s.worst))
        for case, resets in sorted(found.items())
        if case.way in (DIRECT, STANDBY) and case.dirt == 0
        for step, s in breakdown(resets)
    ]
    show(("machine", "way", "step", "p50", "max"), rows, text_columns=3)


def _memory(found: dict[Case, list[Reset]]) -> Iterator[tuple[tuple[str, str], Summary, Summary]]:
    for kind, way in dict.fromkeys((c.kind, c.way) for c in sorted(found)):
        resets = [r for c, rs in found.items() if (c.kind, c.way) == (kind, way) for r in rs]
        yield (
            (kind, way),
            summary([r.own / 1e6 for r in resets]),
            summary([r.unique / 1e6 for r in resets]),
        )


def _as_json(run: Run, args: argparse.Namespace, rig: Rig, load: tuple[float, float]) -> str:
    samples = [
        {**case._asdict(), **r.steps._asdict(), "own": r.own, "unique": r.unique}
        for case, resets in run.results.items()
        for r in resets
    ]
    return json.dumps(
        {
            "seed": args.seed, "accelerator": rig.shop.accelerator, "versions": rig.door.versions(),
            "cores": os.cpu_count(), "load_before_and_after": load, "failed": run.failed, "samples": samples,
        },
        indent=1,
    )  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.reset", description=__doc__)
    kinds = "; ".join(f"{k}: {v}" for k, v in MACHINES.items())
    parser.add_argument("--machines", default="idle,warm", help=kinds)
    parser.add_argument("--only", default=",".join(WAYS), help=f"ways, of {', '.join(WAYS)}")
    parser.add_argument("--dirty", default="0,100,1024", help="MiB that the guest writes before each reset")
    parser.add_argument("--n", type=int, default=30, help="resets of each of ours (default 30)")
    parser.add_argument("--n-cold", type=int, default=30)
    parser.add_argument("--n-internal", type=int, default=30)
    parser.add_argument("--n-large", type=int, default=30, help="at most so many with 1000 MiB or more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write every sample here")
    args = parser.parse_args(argv)
    args.machines, args.only = args.machines.split(","), args.only.split(",")
    args.dirty = [int(d) for d in args.dirty.split(",")]
    for value, known in ((args.machines, MACHINES), (args.only, WAYS)):
        if strange := [v for v in value if v not in known]:
            parser.error(f"unknown: {', '.join(strange)}; there are {', '.join(known)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print; 0 if every reset worked. Aims that were missed are told, and are no failure."""
    args = _arguments(argv)
    counts = {COLD: args.n_cold, INTERNAL: args.n_internal, DIRECT: args.n, STANDBY: args.n}
    cases = wanted(args.machines, [WAYS[w] for w in args.only], args.dirty, counts, args.n_large)
    before = os.getloadavg()[0]
    with sealed_rig() as rig:
        run = measure(rig, cases, args.seed)
        if args.json:
            args.json.write_text(_as_json(run, args, rig, (before, os.getloadavg()[0])) + "\n")
    print_run(run)
    print("\nAims\n")
    show(
        ("what", "asked for", "measured", ""),
        [(a.what, a.limit, a.found, "met" if a.met else "MISSED") for a in aims(run.results)],
    )
    print(f"\nfailed resets: {len(run.failed)}; load of the host before {before:.1f}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
