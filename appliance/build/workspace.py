"""The place where an image comes into being, and how it is cleared after a build that was killed.

One build runs at a time: a lock on ``building/lock``. Whoever holds it owns everything in ``building/``; all
processes of a build carry a random token in their environment, so that those of a dead build can be found and
ended by ownership. Removal never crosses a mount: strays are unmounted first, and a mount that stays is an error.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import BuildError
from appliance.host import command

OWNER = "owner.json"
TOKEN_VARIABLE = "HOTCELL_BUILD"  # noqa: S105 - the name of a marker, no secret
# Stage boundaries at which an interrupted build can go on; between them the tree is in flux and is thrown away.
_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes space, tab, newline and backslash
TREE = "tree"
CONFIGURED = "configured"


@dataclass(frozen=True)
class Workspace:
    """One image in the making: ``building/DIGEST/``."""

    folder: Path
    token: str

    @property
    def root(self) -> Path:
        """The root file system as a directory."""
        return self.folder / "root"

    @property
    def seal(self) -> Path:
        """What becomes the image's folder."""
        return self.folder / "seal"

    @property
    def log(self) -> Path:
        """Output of every outside command of this build."""
        return self.folder / "build.log"

    @property
    def environment(self) -> dict[str, str]:
        """Marks every process of this build."""
        return {TOKEN_VARIABLE: self.token}

    def reached(self) -> str:
        """The last stage boundary that was passed, or an empty string."""
        mark = self.folder / "stage"
        return mark.read_text(encoding="ascii").strip() if mark.is_file() else ""

    def mark(self, stage: str) -> None:
        """Note that a boundary was passed (or, with an empty string, that the tree is in flux)."""
        mark = self.folder / "stage"
        part = mark.with_suffix(".part")
        part.write_text(stage, encoding="ascii")
        part.replace(mark)


def mounts_below(folder: Path, mountinfo: str | None = None) -> tuple[Path, ...]:
    """Mount points inside ``folder``, the deepest first (see proc_pid_mountinfo(5))."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8") if mountinfo is None else mountinfo
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) > 4:
            point = Path(_OCTAL.sub(lambda m: chr(int(m[1], 8)), fields[4]))
            if point.is_relative_to(folder):
                found.append(point)
    return tuple(reversed(found))


def unmount_below(folder: Path) -> None:
    """Undo every mount inside ``folder``.

    Raises:
        BuildError: a mount stays.
    """
    for point in mounts_below(folder):
        command.run(["umount", point], timeout=30, check=False)
    for point in mounts_below(folder):
        command.run(["umount", "--lazy", point], timeout=30, check=False)
    left = mounts_below(folder)
    if left:
        raise BuildError(f"still mounted: {left[0]}", hint=f"umount {left[0]}, then build again")


def remove(folder: Path) -> None:
    """Remove a tree after its mounts are gone; never follows a mount or a link out of it.

    Raises:
        BuildError: a mount stays inside.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    if folder.exists():
        unmount_below(folder)
        command.run(["rm", "-rf", "--one-file-system", "--", folder], timeout=600)


def _processes_of(token: str) -> list[int]:
    needle = f"{TOKEN_VARIABLE}={token}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def end_processes_of(token: str) -> None:
    """Kill every process but this one that carries the token; gives up after 5 s."""
    for _ in range(50):
        left = _processes_of(token)
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def _clear_stray(folder: Path, keep: bool) -> None:
    """End what a dead build left running in ``folder``; remove the folder unless it can be resumed."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        token = str(owner["token"])
    except (OSError, ValueError, KeyError, TypeError):
        token = ""
    if token:
        end_processes_of(token)
    unmount_below(folder)
    if not keep or not Workspace(folder, token).reached():
        remove(folder)


def process_start(pid: int) -> int:
    """Start time of a process in clock ticks since boot, field 22 of proc_pid_stat(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])


@contextmanager
def building_lock(building: Path, *, wait_s: float, waiting: str = "") -> Iterator[None]:
    """Hold the lock of ``building/`` for the length of a block.

    Raises:
        BuildError: another build holds it for longer than ``wait_s`` seconds.
    """
    building.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(building / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(fd, 64, 0).decode(errors="replace").strip()
                    raise BuildError(
                        f"another build is running (process {holder or 'unknown'}){waiting}",
                        hint="wait for it to end, or stop it",
                    ) from None
                time.sleep(0.2)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def open_workspace(building: Path, digest: str) -> Workspace:
    """Clear what dead builds left, then make or resume the workspace of ``digest``. Needs the lock."""
    for folder in sorted(building.iterdir()):
        if folder.is_dir():
            _clear_stray(folder, keep=folder.name == digest)
    folder = building / digest
    folder.mkdir(mode=0o700, exist_ok=True)
    workspace = Workspace(folder, secrets.token_hex(16))
    owner = {"pid": os.getpid(), "start": process_start(os.getpid()), "token": workspace.token}
    (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
    return workspace


def run_logged(
    workspace: Workspace,
    argv: list[str | os.PathLike[str]],
    *,
    timeout: float,
    what: str,
    env: dict[str, str] | None = None,
) -> None:
    """Run one step of a build, its output in the build's log.

    Raises:
        BuildError: it failed; the message holds the log's tail.
    """
    with workspace.log.open("ab") as log:
        start = log.tell()
        process = command.spawn(argv, env={**workspace.environment, **(env or {})}, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + timeout
            while (rc := process.poll()) is None:
                if time.monotonic() > deadline:
                    raise BuildError(f"{what} ran longer than {timeout:.0f} s", hint="see the build log")
                time.sleep(0.05)
        finally:
            command.end(process)
    if rc != 0:
        tail = workspace.log.read_bytes()[start:][-3000:].decode(errors="replace").strip()
        raise BuildError(
            f"{what} failed with status {rc}\n{tail}", hint=explain(tail), log=str(workspace.log)
        )


def explain(output: str) -> str:
    """What to do about a failure, from what the program said."""
    text = output.lower()
    if "no space left" in text or "enospc" in text or "disk full" in text:
        return "free some disk space in the cache's file system, then build again"
    network = (
        "could not resolve",
        "temporary failure",
        "connection refused",
        "timed out",
        "unreachable",
        "failed to fetch",
        "unable to connect",
        "connection failed",
        "newconnectionerror",
        "max retries",
    )
    if any(word in text for word in network):
        return (
            "the package registry did not answer; check the host's network and its apt and pip configuration"
        )
    return "see the build log"
