"""The campaign: point after point, each followed by everything that must hold; a line each, a table, a JSON file.

Run as root: ``.venv/bin/python -m tests.torture --count 200 --seed 1``. See docs/torture.md.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from appliance.errors import HotcellError
from appliance.service import HealthView
from tests.torture import actions, checks, strikes
from tests.torture.disk import LoopDisk
from tests.torture.points import DEFAULT_KINDS, Point
from tests.torture.rig import Rig

# The warden has 10 s to notice a server that hangs; one that is gone it notices at once.
_CUT_S = 20.0


@dataclass
class Result:
    """What became of one point."""

    number: int
    kind: str
    where: str
    struck: str = ""
    trial: str = ""
    outcome: str = ""
    told: str = ""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """One line of progress."""
        verdict = "ok" if not self.faults else "FAULT " + "; ".join(self.faults)
        return (
            f"{self.number:4} {self.kind:17} {self.where:32} {self.struck or 'missed':48.48} "
            f"{self.outcome:8} {self.seconds:6.1f} s  {verdict}"
        )


class Campaign:
    """Runs points on one rig. ``disk`` is the home's own file system, if it has one.

    The next thing after a point is a whole trial at every ``trial_every``-th, else a cell opened and reset.
    """

    def __init__(self, rig: Rig, disk: LoopDisk | None, trial_every: int = 1) -> None:
        self.rig = rig
        self.disk = disk
        self.trial_every = trial_every
        self.created: set[str] = set()
        self.verified: set[str] = set()

    def prepare(self) -> list[str]:
        """Make the baselines that all points share, and see that the laboratory works before it is struck."""
        self.rig.forget("snap-*")
        self.rig.up()
        return checks.works(self.rig, with_trial=False)

    def run(self, point: Point) -> Result:
        """One point, with all that must hold after it."""
        began = time.monotonic()
        result = Result(point.number, point.kind, point.where)
        try:
            self._strike(point, result)
            result.faults += self._recover(point)
            result.faults += checks.after_point(self.rig, self.created, self.verified)
            result.faults += checks.works(self.rig, with_trial=point.number % self.trial_every == 0)
            result.outcome = self._outcome(result.trial)
        except Exception as e:  # noqa: BLE001 - whatever it is, it is what this point found
            result.faults.append(f"{type(e).__name__}: {e}")
        if result.faults:
            self._start_over(result)
        result.seconds = round(time.monotonic() - began, 1)
        return result

    def _strike(self, point: Point, result: Result) -> None:
        acting = actions.begin(self.rig, point)
        if acting.trial:
            result.trial = acting.trial
            self.created.add(acting.trial)
        result.struck = strikes.strike(self.rig, self.disk, point).whom
        if acting.job is not None:
            if not acting.job.wait(actions.ACTION_S):
                result.faults.append(f"the request did not end within {actions.ACTION_S:.0f} s")
            result.told = acting.job.error

    def _recover(self, point: Point) -> list[str]:
        """Put right what an operator would: start the server again, free the disk, set the clock."""
        faults: list[str] = []
        if point.kind == "server" and point.action != "restart":
            faults += checks.nothing_runs(self.rig, _CUT_S)
        if point.kind == "warden":
            faults += self._refuses()
        if point.kind in ("disk-full", "clock"):
            faults += self._let_it_end(point)
        if point.kind in strikes.NEEDS_START:
            if point.kind == "read-only":
                self.rig.kill()
                faults += checks.nothing_runs(self.rig, _CUT_S)
            else:
                self.rig.stop()
            self._put_right()
        self.rig.up()
        return faults

    def _put_right(self) -> None:
        """Give the disk back and set the clock, while no server runs."""
        self.rig.clock.unlink(missing_ok=True)
        if self.disk is not None:
            if self.disk.read_only:
                self.disk.repair()
            self.disk.empty()
        self.rig.forget("snap-*")

    def _refuses(self) -> list[str]:
        with self.rig.client() as client:
            end = time.monotonic() + 5
            while client.get(HealthView, "health").accepting:
                if time.monotonic() > end:
                    return ["5 s after its warden was killed the server still accepts trials"]
                time.sleep(0.1)
        return []

    def _let_it_end(self, point: Point) -> list[str]:
        """What runs under the fault has to come to an end by itself."""
        with self.rig.client() as client:
            for trial in self.rig.trials(client).values():
                if not trial.state.ended:
                    try:
                        self.rig.ended(client, trial.id, 120)
                    except HotcellError as e:
                        return [f"under {point.kind}: {e.message}"]
        return []

    def _outcome(self, trial: str) -> str:
        if not trial:
            return ""
        with self.rig.client() as client:
            return str(self.rig.trials(client)[trial].state)

    def _start_over(self, result: Result) -> None:
        """After a fault the next point begins with a server of its own, so that one fault is not told twice."""
        try:
            self.rig.stop()
        except (RuntimeError, HotcellError, OSError) as e:
            result.faults.append(f"stopping it: {e}")
            self.rig.kill()
        self._put_right()

    def finish(self) -> list[str]:
        """Stop the server as a user does; what must hold then."""
        try:
            status = self.rig.stop()
        except RuntimeError as e:
            return [str(e)]
        faults = checks.at_the_end(self.rig)
        return faults if status in (0, None) else [*faults, f"the server ended with {status}"]


def table(results: list[Result]) -> str:
    """The closing table: per kind, points, misses, how trials ended, faults, seconds a point."""
    head = f"{'kind':17} {'points':>6} {'missed':>6} {'sealed':>6} {'void':>5} {'aborted':>7} {'faults':>6}"
    lines = [f"{head} {'s/point':>8}"]
    for kind in [*dict.fromkeys(r.kind for r in results), "all"]:
        own = [r for r in results if kind in (r.kind, "all")]
        ends = Counter(r.outcome for r in own)
        mean = sum(r.seconds for r in own) / max(1, len(own))
        lines.append(
            f"{kind:17} {len(own):6} {sum(not r.struck for r in own):6} {ends['sealed']:6} {ends['void']:5} "
            f"{ends['aborted']:7} {sum(bool(r.faults) for r in own):6} {mean:8.1f}"
        )
    return "\n".join(lines)


def results_file(work: Path, seed: int, kinds: Sequence[str], *, single: bool) -> Path:
    """Where results go: one file a campaign, since other kinds are other points under the same numbers.

    ``single`` points that are repeated have a file of their own: they are not the campaign's numbers.
    """
    own = "" if tuple(kinds) == DEFAULT_KINDS else "-" + "+".join(kinds)
    return work / f"seed-{seed}{own}{'-only' if single else ''}.jsonl"


def keep(file: Path, result: Result) -> None:
    """Add a result to the file that a campaign can go on from."""
    with file.open("a") as f:
        f.write(json.dumps(asdict(result)) + "\n")


def known(file: Path) -> list[Result]:
    """Results of an earlier part of the campaign."""
    if not file.exists():
        return []
    return [Result(**json.loads(line)) for line in file.read_text().splitlines() if line]
