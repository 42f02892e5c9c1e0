"""``python -m tests.torture``: the long campaign, see docs/torture.md."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from appliance.host.paths import default_paths
from tests.torture import build
from tests.torture.campaign import Campaign, Result, keep, known, results_file, table
from tests.torture.disk import LoopDisk
from tests.torture.points import DEFAULT_KINDS, Point, campaign
from tests.torture.rig import Rig


def say(text: str) -> None:
    """One piece of progress, at once also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    """What the command line says."""
    p = argparse.ArgumentParser(prog="tests.torture", description=__doc__)
    p.add_argument("--seed", type=int, default=1, help="what the points are drawn from (default 1)")
    p.add_argument("--count", type=int, default=200, help="how many points (default 200)")
    p.add_argument("--kinds", default=",".join(DEFAULT_KINDS), help="who is struck, separated by commas")
    p.add_argument("--only", default="", help="numbers of single points to repeat, separated by commas")
    p.add_argument(
        "--work", type=Path, default=Path("/var/tmp/hctorture"), help="a folder of the campaign's own"
    )
    p.add_argument(
        "--fresh", action="store_true", help="forget earlier results instead of going on from them"
    )
    p.add_argument("--minutes", type=float, default=0, help="stop after the point that passes this time")
    p.add_argument(
        "--trial-every", type=int, default=1, metavar="N",
        help="a whole trial has to succeed after every Nth point, after the others a cell and a reset (default 1)",
    )  # fmt: skip
    a = p.parse_args()
    if a.trial_every < 1:
        p.error(f"--trial-every {a.trial_every}: at least 1")
    return a


def main() -> int:
    """Run the points that are not done yet; 0 if none of all has a fault."""
    a = arguments()
    if os.geteuid() != 0:
        sys.stderr.write("run as root: machines, loop devices and namespaces need it\n")
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background, where a shell has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    kinds = tuple(k for k in a.kinds.split(",") if k)
    points = campaign(a.seed, a.count, kinds)
    wanted = {int(n) for n in a.only.split(",") if n}
    a.work.mkdir(parents=True, exist_ok=True)
    file = results_file(a.work, a.seed, kinds, single=bool(wanted))
    if a.fresh and not wanted:
        file.unlink(missing_ok=True)
    results = [] if wanted else known(file)
    done = {r.number for r in results}
    todo = [p for p in points if p.number not in done and (not wanted or p.number in wanted)]
    began = time.monotonic()
    closing = _run(a.work, todo, results, file, 60 * a.minutes or float("inf"), a.trial_every)
    faults = sum(bool(r.faults) for r in results) + bool(closing)
    report = {
        "seed": a.seed, "kinds": kinds, "count": a.count, "done": len(results), "closing": closing,
        "seconds": round(time.monotonic() - began, 1), "points": [asdict(r) for r in results],
    }  # fmt: skip
    file.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    say(f"\n{table(results)}\n\nat the end: {'; '.join(closing) or 'nothing is left'}")
    say(
        f"{len(results)} of {len(wanted) or a.count} points done, {faults} with faults; {file.with_suffix('.json')}"
    )
    return 1 if faults else 0


def _run(
    work: Path, todo: list[Point], results: list[Result], file: Path, limit_s: float, trial_every: int
) -> list[str]:
    began = time.monotonic()

    def go(points: list[Point], one: Callable[[Point], Result]) -> None:
        for point in points:
            if time.monotonic() - began > limit_s:
                return
            results.append(one(point))
            keep(file, results[-1])
            say(results[-1].line)

    go([p for p in todo if p.kind == "build"], lambda p: build.run(work, p))
    todo = [p for p in todo if p.kind != "build"]
    if not todo:
        return []
    disk = LoopDisk(work / "home.img", work / "h")
    disk.mount()
    rig = Rig(default_paths(home=disk.folder).make(), work / "server.log")
    run = Campaign(rig, disk, trial_every)
    try:
        rig.clock.unlink(missing_ok=True)
        disk.empty()
        if unfit := run.prepare():
            return unfit
        say(f"prepared in {time.monotonic() - began:.1f} s; {len(todo)} points to go")
        began = time.monotonic()
        go(todo, run.run)
    finally:
        closing = run.finish()
        disk.unmount()
    return closing


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write(
            "stopped, and cleaned up; the same command goes on with the point that was interrupted\n"
        )
        sys.exit(130)
