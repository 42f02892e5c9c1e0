"""Points of a build: ``hotcell build world`` is killed at a moment of its own, and the next one has to succeed.

Slow (it makes a root tree from the network each time), so drawn only when asked for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from appliance.build.workspace import TOKEN_VARIABLE, mounts_below
from tests.torture.campaign import Result
from tests.torture.points import Point
from tests.torture.rig import ROOT

_LIMIT_S = 900.0
_RECIPE = "world"


def run(work: Path, point: Point) -> Result:
    """Kill one build and let the next one finish."""
    began = time.monotonic()
    result = Result(point.number, point.kind, point.where)
    cache = work / "c"
    shutil.rmtree(cache / "images", ignore_errors=True)  # a build that is up to date does nothing
    first = _build(work, cache)
    time.sleep(point.delay)
    if first.poll() is None:
        first.kill()
        result.struck = f"build {first.pid}"
    first.wait()
    second = _build(work, cache)
    try:
        status = second.wait(_LIMIT_S)
    except subprocess.TimeoutExpired:
        second.kill()
        second.wait()
        status = -1
    if status != 0:
        result.faults.append(
            f"the next build ended with {status}: {_log(work).read_text(errors='replace')[-500:]}"
        )
    result.faults += [f"still mounted: {m}" for m in mounts_below(cache)]
    result.faults += [f"half-built: {p}" for p in (cache / "building").iterdir() if p.is_dir()]
    result.faults += [f"process {pid} of a dead build" for pid in _orphans(cache)]
    result.outcome = "built" if status == 0 else ""
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _log(work: Path) -> Path:
    return work / "build.log"


def _build(work: Path, cache: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "appliance.cli", "--home", str(work / "h"), "--cache", str(cache)]
    with _log(work).open("wb") as log:
        return subprocess.Popen(
            [*argv, "build", _RECIPE], stdout=log, stderr=log, cwd=ROOT, env={**os.environ}
        )


def _orphans(cache: Path) -> list[int]:
    """Processes that carry a build's mark and work below this cache."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                marked = TOKEN_VARIABLE.encode() in (entry / "environ").read_bytes()
                if marked and os.fsencode(cache) in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
