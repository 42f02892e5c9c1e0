"""What lies on a machine's disk, read from outside, in user space, without trusting the disk.

The filesystem was written by a guest, so it is never mounted: it is parsed in pure Python, in a child
process with limits on memory and processor time, and the child is killed when its time is up.
The machine must be down or paused; with the guest frozen by ``fsfreeze`` the disk is consistent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from appliance.errors import CommandError
from appliance.host import command
from appliance.host.paths import PROJECT
from appliance.model import Frozen, printable
from appliance.trial.records import DiskFinding, FoundFile, WeightFile

MAX_INODES = 1_000_000  # in use
MAX_DEPTH = 64  # of the directories that are searched for names
MAX_HASHED_PER_SIZE = 64  # files of a weight's size that are hashed before the search gives up
MEMORY_BYTES = 1 << 30
TIMEOUT_S = 300.0
Flushed = Literal["fsfreeze", "none"]


class DiskQuestion(Frozen):
    """What the child is asked, as JSON on its standard input."""

    overlay: str
    sizes: dict[str, int] = Field(default_factory=dict, description="SHA-256 to size of the wanted files")
    names: dict[str, str] = Field(default_factory=dict, description="SHA-256 to file name, tried first")
    max_inodes: int = MAX_INODES
    max_depth: int = MAX_DEPTH
    max_hashed: int = MAX_HASHED_PER_SIZE
    memory: int = MEMORY_BYTES
    cpu_s: int = int(TIMEOUT_S)


class DiskAnswer(Frozen):
    """What the child answers, as JSON on its standard output."""

    examined: int
    found: tuple[FoundFile, ...] = ()
    problem: str = ""


def find_weights(
    overlay: Path,
    weights: Sequence[WeightFile],
    *,
    machine: str,
    flushed: Flushed,
    timeout: float = TIMEOUT_S,
) -> DiskFinding:
    """Look for files with the weights' content anywhere on a disk.

    Sizes are compared first and only files of a wanted size are hashed; names do not matter, and a file that
    was unlinked while it was open counts too. One copy of each is reported. Whatever goes wrong in reading the
    disk is said in ``problem`` of the finding, beside what was found until then.
    """
    question = DiskQuestion(
        overlay=str(overlay),
        sizes={w.sha256: w.size for w in weights},
        names={w.sha256: w.name for w in weights},
        cpu_s=max(1, int(timeout)),
    )
    answer = _ask(question, timeout)
    return DiskFinding(
        machine=machine,
        flushed=flushed,
        examined=answer.examined,
        weights=answer.found,
        problem=answer.problem,
    )


def _ask(question: DiskQuestion, timeout: float) -> DiskAnswer:
    argv = [sys.executable, "-m", "appliance.evidence.disk_worker"]
    try:
        done = command.run(
            argv,
            timeout=timeout,
            check=False,
            cwd=PROJECT,
            stdin=question.model_dump_json().encode(),
            tied=True,
        )
    except CommandError as e:
        return DiskAnswer(examined=0, problem=f"reading the disk: {printable(e.message, 300)}")
    if done.rc != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return DiskAnswer(
            examined=0, problem=f"reading the disk ended with status {done.rc}: {printable(last, 300)}"
        )
    try:
        return DiskAnswer.model_validate_json(done.stdout)
    except ValidationError:
        return DiskAnswer(examined=0, problem="reading the disk gave an answer that is not one")
