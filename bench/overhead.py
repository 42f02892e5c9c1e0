"""What a trial costs beside the subject's own time, stage by stage, from its journal.

As root: ``.venv/bin/python -m bench.overhead [BUNDLE ...]``. Without a bundle it runs ``--trials`` claimers
through a server of its own in the home that ``HOTCELL_HOME`` names, after one more that is not counted: it
makes or reads the baselines. A claimer ends before the next standbys are made, so that they compete with its
probes; ``--subject idle --wall 30`` leaves them the subject's time, as a subject that works does. With bundles it
runs nothing and needs no root.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from appliance.evidence import bundle as bundles
from appliance.evidence.journal import read
from appliance.host.paths import default_paths
from appliance.trial import records
from appliance.trial.records import JournalEntry
from bench.common.server import run_trial, running_server
from bench.common.stats import summary
from bench.common.table import show

AIM_S = 15.0
SUBJECT, ONCE, SEAL = "the subject's own time", "baselines made (once a home)", "seal"
WAITED, RESET, REFERENCE = (
    "waited for room",
    "reset of both machines, proved",
    "reference on a pristine origin",
)
NOT_OVERHEAD = (SUBJECT, ONCE, WAITED)
# journal event -> the stage that ends with it; the time since the entry before belongs to that stage
_STAGES = {
    "baseline-making": ONCE,
    "baseline-made": ONCE,
    "resetting": "plan, baselines looked up",
    "capture-confirmed": "capture, confirmed",
    "seal-examined": "seal of the namespace examined",
    "preflight": "plug, probe before, preflight",
    records.STARTED: "plug, probe before, preflight",
    "stopping": SUBJECT,
    records.STOPPED: "agent stopped",
    "settling": "probes, origin live",
    "settled": "probes, origin live",
    "origin-frozen": "probes, origin live",
    "collected": "collect: capture, disks",
    "reference": REFERENCE,
    "scored": "machines ended, score",
}
_PROBES = {
    "before": "plug, probe before, preflight",
    "origin-live": "probes, origin live",
    "origin-frozen": "probes, origin frozen",
}


def stages(entries: Iterable[JournalEntry], sealed_at: float | None = None) -> dict[str, float]:
    """Seconds of each stage, in order; their sum is the whole trial. Pure.

    ``sealed_at`` (Unix seconds) is when the bundle was ready, which its own journal cannot say.
    """
    found: dict[str, float] = {}
    since: float | None = None
    collected = waiting = False
    for entry in entries:
        stage = _stage(entry, collected=collected)
        collected |= entry.event == "collected"
        if since is None:
            since = entry.at
        elif entry.event == "waiting":
            waiting = True
        elif stage is not None:
            stage, waiting = (WAITED if waiting else stage), False
            found[stage] = found.get(stage, 0.0) + entry.at - since
            since = entry.at
    if since is not None and sealed_at is not None and sealed_at > since:
        found[SEAL] = found.get(SEAL, 0.0) + sealed_at - since
    return found


def _stage(entry: JournalEntry, *, collected: bool) -> str | None:
    """The stage that ends with an entry; None where the time goes on to the next entry that ends one."""
    if entry.event == "probe":
        return _PROBES.get(str(entry.fields.get("phase")), "other probes")
    if entry.event in ("proved", "machine-withheld", "in-place"):
        return REFERENCE if collected else RESET
    if entry.event in ("sealed", "void", "aborted"):
        return SEAL
    return _STAGES.get(entry.event)


def overhead(found: Mapping[str, float]) -> float:
    """Seconds that are neither the subject's nor spent once. Pure."""
    return sum(s for name, s in found.items() if name not in NOT_OVERHEAD)


def of_bundle(folder: Path) -> dict[str, float]:
    """Stages of a sealed bundle; its manifest is the last thing written."""
    return stages(read(folder / records.JOURNAL), (folder / bundles.MANIFEST).stat().st_mtime)


def measure(subject: str, count: int, wall_s: float | None) -> list[dict[str, float]]:
    """Run trials through a server, the first one uncounted."""
    paths = default_paths().make()
    found = []
    with running_server(paths) as server:
        for n in range(count + 1):
            trial = run_trial(server.client, subject, n, wall_s=wall_s)
            ended = time.time()
            if trial.state != "sealed":
                raise SystemExit(f"trial {trial.id} is {trial.state}: {trial.reason}")
            # Until the client saw the end: sealing, verifying and indexing are overhead too.
            found.append(stages(read(paths.bundles / trial.id / records.JOURNAL), ended))
            print(f"{trial.id} {trial.state}: overhead {overhead(found[-1]):.2f} s", flush=True)
    return found[1:]


def report(trials: Sequence[Mapping[str, float]]) -> float:
    """Print the breakdown; returns the median overhead in seconds."""
    names = list(dict.fromkeys(name for t in trials for name in t))
    rows = []
    for name in names:
        s = summary([t.get(name, 0.0) for t in trials])
        rows.append((name, "no" if name in NOT_OVERHEAD else "yes", f"{s.p50:.2f}", f"{s.worst:.2f}"))
    total = summary([overhead(t) for t in trials])
    rows.append(("overhead in all", "", f"{total.p50:.2f}", f"{total.worst:.2f}"))
    show(("stage", "overhead", "median s", "worst s"), rows, text_columns=2)
    verdict = "within" if total.p50 <= AIM_S else "MISSED by"
    gap = abs(AIM_S - total.p50)
    print(
        f"\n{len(trials)} trials, median overhead {total.p50:.2f} s; aim {AIM_S:.0f} s: {verdict} {gap:.2f} s"
    )
    return total.p50


def main(argv: Sequence[str] | None = None) -> int:
    """Measure or read, print, and tell by the exit status whether the aim was met."""
    parser = argparse.ArgumentParser(prog="bench.overhead", description=__doc__)
    parser.add_argument("bundle", nargs="*", type=Path, help="sealed trials to read in place of running some")
    parser.add_argument("--subject", default="claimer")
    parser.add_argument("--wall", type=float, help="the longest that a subject may take, seconds")
    parser.add_argument("--trials", type=int, default=5, help="trials to run (default 5)")
    parser.add_argument("--json", type=Path, help="also write the stages of every trial here")
    args = parser.parse_args(argv)
    found = [of_bundle(b) for b in args.bundle] or measure(args.subject, args.trials, args.wall)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if report(found) <= AIM_S else 1


if __name__ == "__main__":
    sys.exit(main())
