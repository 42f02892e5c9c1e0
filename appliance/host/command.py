"""The one door to other programs: argv lists, a minimal environment, a mandatory limit, always reaped.

Nothing else in the package imports ``subprocess``. No shell is ever involved.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from appliance.errors import CommandError

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TAIL = 4000
Process = subprocess.Popen


class Completed(NamedTuple):
    """What a finished command left: exit status, and its two streams decoded with replacement."""

    rc: int
    stdout: str
    stderr: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A minimal environment: PATH, HOME, C.UTF-8, and only what the caller names."""
    return {"PATH": _PATH, "HOME": os.environ.get("HOME", "/root"), "LANG": "C.UTF-8", **(extra or {})}


def require(program: str, package: str) -> str:
    """Absolute path of a program.

    Raises:
        CommandError: it is not installed; the hint names the Debian package.
    """
    found = shutil.which(program, path=_PATH)
    if found is None:
        raise CommandError(f"{program} is not installed", hint=f"apt-get install {package}", program=program)
    return found


def _tie() -> list[str]:
    """What makes a program die with the thread that starts it; an exec that costs 1 ms, and no fork of ours."""
    return [require("setpriv", "util-linux"), "--pdeathsig", "KILL"]


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout: float,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    tied: bool = False,
) -> Completed:
    """Run a program to its end within ``timeout`` seconds; with ``tied`` it ends with us, however we end.

    Raises:
        CommandError: the program is missing, ran out of time, or (with ``check``) exited non-zero.
            The message holds a line that can be pasted into a shell to repeat the call.
    """
    args = [os.fspath(a) for a in argv]
    line = shlex.join(args)
    try:
        process = subprocess.Popen(  # noqa: S603 - an argv list, no shell
            [*_tie(), *args] if tied else args,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(env),
            cwd=cwd,
            start_new_session=True,
        )
    except FileNotFoundError as e:
        raise CommandError(f"{args[0]}: not found", hint="run `hotcell doctor`", command=line) from e
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired as e:
        raise CommandError(f"ran longer than {timeout:.0f} s: {line}", command=line) from e
    finally:
        end(process, grace=0)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):  # it ended before it read all of our input
                    pipe.close()
    done = Completed(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
    if check and done.rc != 0:
        tail = (done.stderr or done.stdout).strip()[-_TAIL:]
        raise CommandError(f"exit status {done.rc}: {line}\n{tail}", command=line, rc=done.rc)
    return done


def spawn(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    stdout: IO[bytes] | int = subprocess.DEVNULL,
    stderr: IO[bytes] | int = subprocess.DEVNULL,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
    tied: bool = False,
) -> Process[bytes]:
    """Start a helper in a session of its own, so that Ctrl-C reaches only us. The caller ends it.

    With ``tied`` the kernel kills it once the *thread* that started it ends: one that lasts has to do that.
    """
    args = [os.fspath(a) for a in argv]
    try:
        return subprocess.Popen(  # noqa: S603 - an argv list, no shell
            [*_tie(), *args] if tied else args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=environment(env),
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except FileNotFoundError as e:
        raise CommandError(f"{args[0]}: not found", hint="run `hotcell doctor`") from e


def end(process: Process[bytes], *, grace: float = 5.0, sig: int = signal.SIGTERM) -> int:
    """Stop a helper: ``sig``, ``grace`` seconds, then SIGKILL to its whole session. Returns its status."""
    if process.poll() is None and grace > 0:
        process.send_signal(sig)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
    return process.wait()
