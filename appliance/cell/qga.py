"""Commands in a guest through the QEMU guest agent, whose every reply is hostile input.

Replies are checked against what an honest agent can produce; anything beyond is tampering, which is a
finding about the subject, never a reason to retry. Protocol:
https://www.qemu.org/docs/master/interop/qemu-ga-ref.html
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from appliance.errors import GuestChannelError, GuestTamperError, GuestTimeoutError
from appliance.model import printable

MAX_OUTPUT = 1 << 20
_CHUNK = 32 * 1024  # 256 KiB in one write wedges some agents
_MAX_REPLY = 10 << 20  # libvirt takes no longer one; an honest agent keeps 16 MiB of a program's output
M = TypeVar("M")


class Channel(Protocol):
    """How a request line reaches a guest's agent and its reply comes back."""

    def __call__(self, request: str, timeout_s: int, /) -> str:
        """Raises GuestChannelError if nothing came back in time."""


class _Strict(BaseModel):
    # An agent may know more fields than we do; the ones we read are strictly typed and bounded.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Pid(_Strict):
    pid: int = Field(gt=0, le=1 << 22)


_Base64 = Annotated[str, Field(max_length=_MAX_REPLY)]


class _Status(_Strict):
    exited: bool
    exitcode: int | None = Field(default=None, ge=0, le=255)
    signal: int | None = Field(default=None, ge=0, le=64)
    out_data: _Base64 = Field(default="", alias="out-data")
    err_data: _Base64 = Field(default="", alias="err-data")
    out_truncated: bool = Field(default=False, alias="out-truncated")
    err_truncated: bool = Field(default=False, alias="err-truncated")


class _Read(_Strict):
    data: _Base64 = Field(alias="buf-b64")


class _Written(_Strict):
    count: int = Field(ge=0, le=_CHUNK)


class GuestResult(NamedTuple):
    """What a command in the guest left. ``rc`` is 128 + signal when a signal ended it. Output is bytes."""

    rc: int
    stdout: bytes
    stderr: bytes
    truncated: bool

    @property
    def text(self) -> str:
        """Standard output decoded with replacement."""
        return self.stdout.decode(errors="replace")


class Qga:
    """The agent of one machine. Not meant for parallel use: libvirt allows one command at a time."""

    def __init__(
        self, channel: Channel, machine: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._channel = channel
        self._machine = machine
        self._clock = clock

    def call(
        self,
        command: str,
        adapter: TypeAdapter[M],
        arguments: dict[str, object] | None = None,
        *,
        timeout_s: int = 10,
    ) -> M:
        """One command; its ``return`` value checked against ``adapter``.

        Raises:
            GuestChannelError: no reply, or the agent refused the command.
            GuestTamperError: the reply is nothing an honest agent sends.
        """
        request = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
        reply = self._channel(request, timeout_s)
        if len(reply) > _MAX_REPLY:
            raise self._tampered(command, f"{len(reply)} characters, at most {_MAX_REPLY} are honest")
        try:
            answer = json.loads(reply)
        except (ValueError, RecursionError) as e:
            raise self._tampered(command, f"not JSON: {printable(reply, 80)}") from e
        if not isinstance(answer, dict) or "return" not in answer:
            detail = answer.get("error") if isinstance(answer, dict) else answer
            raise GuestChannelError(f"{self._machine}: qga refused {command}: {printable(str(detail), 200)}")
        try:
            return adapter.validate_python(answer["return"])
        except ValidationError as e:
            problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in e.errors()[:3])
            raise self._tampered(command, printable(problems, 300)) from e

    def ping(self, timeout_s: int = 2) -> bool:
        """True if the agent answers in time."""
        try:
            self.call("guest-ping", _ANYTHING, timeout_s=timeout_s)
        except (GuestChannelError, GuestTamperError):
            return False
        return True

    def exec(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = 30,
        stdin: bytes = b"",
        env: Sequence[str] = (),
        poll_s: float = 0.02,
    ) -> GuestResult:
        """Run a program as root in the guest and wait for its end.

        By path, or by a name that the agent looks up on its own PATH; what we run ourselves is always by
        absolute path.

        Raises:
            GuestTimeoutError: the program ran longer than ``timeout_s``, and goes on.
            GuestChannelError: the agent fell silent, or could not start the program.
            GuestTamperError: a reply is nothing an honest agent sends.
        """
        arguments: dict[str, object] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        if stdin:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        if env:
            arguments["env"] = list(env)
        pid = self.call("guest-exec", _PID, arguments).pid
        deadline = self._clock() + timeout_s
        while True:
            status = self.call("guest-exec-status", _STATUS, {"pid": pid})
            if status.exited:
                return self._result(status)
            if self._clock() >= deadline:
                raise GuestTimeoutError(
                    f"{self._machine}: {printable(argv[0], 60)} ran longer than {timeout_s:.0f} s", pid=pid
                )
            time.sleep(poll_s)
            poll_s = min(poll_s * 1.5, 0.5)

    def start(self, argv: Sequence[str], *, stdin: bytes = b"") -> int:
        """Start a program in the guest without waiting; returns its pid there."""
        arguments: dict[str, object] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": False}
        if stdin:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        return self.call("guest-exec", _PID, arguments).pid

    def python(self, script: str, *args: str, timeout_s: float = 30) -> GuestResult:
        """Run our own script with the guest's isolated system Python; arguments never become code."""
        return self.exec(["/usr/bin/python3", "-I", "-", *args], timeout_s=timeout_s, stdin=script.encode())

    def write_file(self, path: str, data: bytes, *, mode: int = 0o600, owner: str = "root:root") -> None:
        """Write a file in the guest in 32 KiB pieces, then set mode and owner.

        Raises:
            GuestChannelError: the guest refused, or the file could not be given its mode and owner.
        """
        with self._opened(path, "w") as handle:
            for start in range(0, len(data), _CHUNK):
                piece = base64.b64encode(data[start : start + _CHUNK]).decode()
                written = self.call("guest-file-write", _WRITTEN, {"handle": handle, "buf-b64": piece}).count
                if written != len(data[start : start + _CHUNK]):
                    raise GuestChannelError(f"{self._machine}: {path} was not written whole; a full disk?")
        for argv in (["/bin/chmod", f"{mode:o}", path], ["/bin/chown", owner, path]):
            done = self.exec(argv)
            if done.rc != 0:
                raise GuestChannelError(
                    f"{self._machine}: {argv[0]} {path}: {printable(done.stderr.decode(errors='replace'))}"
                )

    def read_file(self, path: str, limit: int) -> bytes:
        """The first ``limit`` bytes of a file.

        Raises:
            GuestChannelError: it does not exist, or the guest refused.
            GuestTamperError: a reply is nothing an honest agent sends.
        """
        with self._opened(path, "r") as handle:
            read = self.call("guest-file-read", _READ, {"handle": handle, "count": limit})
        try:
            return base64.b64decode(read.data, validate=True)[:limit]
        except (binascii.Error, ValueError) as e:
            raise self._tampered("guest-file-read", "content is not base64") from e

    @contextlib.contextmanager
    def _opened(self, path: str, mode: str) -> Iterator[int]:
        handle = self.call("guest-file-open", _HANDLE, {"path": path, "mode": mode})
        try:
            yield handle
        finally:
            self.call("guest-file-close", _ANYTHING, {"handle": handle})

    def freeze_filesystems(self, timeout_s: int = 20) -> int:
        """Flush and freeze all filesystems; returns how many. The journal is empty afterwards."""
        return self.call("guest-fsfreeze-freeze", _COUNT, timeout_s=timeout_s)

    def thaw_filesystems(self, timeout_s: int = 20) -> int:
        """Undo :meth:`freeze_filesystems`."""
        return self.call("guest-fsfreeze-thaw", _COUNT, timeout_s=timeout_s)

    def set_time(self, unix_s: float) -> None:
        """Set the guest's system clock; one that was saved or paused still has the time of then.

        Raises:
            GuestChannelError: the agent is silent, or the clock could not be set.
        """
        done = self.exec(["/bin/date", "-u", "-s", f"@{unix_s:.6f}"])
        if done.rc != 0:
            said = printable(done.stderr.decode(errors="replace"), 200)
            raise GuestChannelError(f"{self._machine}: the clock could not be set: {said}")

    def _result(self, status: _Status) -> GuestResult:
        rc = status.exitcode if status.exitcode is not None else 128 + (status.signal or 0)
        try:
            out = base64.b64decode(status.out_data, validate=True)
            err = base64.b64decode(status.err_data, validate=True)
        except (binascii.Error, ValueError) as e:
            raise self._tampered("guest-exec-status", "output is not base64") from e
        cut = status.out_truncated or status.err_truncated or max(len(out), len(err)) > MAX_OUTPUT
        return GuestResult(rc, out[:MAX_OUTPUT], err[:MAX_OUTPUT], cut)

    def _tampered(self, command: str, detail: str) -> GuestTamperError:
        return GuestTamperError(
            f"{self._machine}: the reply to {command} is nothing an honest guest agent sends: {detail}",
            machine=self._machine,
        )


_ANYTHING: TypeAdapter[object] = TypeAdapter(object)
_PID: TypeAdapter[_Pid] = TypeAdapter(_Pid)
_STATUS: TypeAdapter[_Status] = TypeAdapter(_Status)
_HANDLE: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(strict=True, ge=0, lt=1 << 53)])
_READ: TypeAdapter[_Read] = TypeAdapter(_Read)
_WRITTEN: TypeAdapter[_Written] = TypeAdapter(_Written)
_COUNT: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(strict=True, ge=0, le=64)])
