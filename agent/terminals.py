"""Terminals 1 to 5: each one a persistent shell, so that directory and variables last between commands.

A shell reports each command's exit status on a pipe of its own (descriptor 3, closed for the command), so
nothing a command prints can be taken for it. Output is kept head and tail, the middle is counted and
dropped. Each shell leads its own session; closing a terminal ends its process group. A program that left the
group on purpose (setsid) lives on, as it would after any closed terminal.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

TERMINALS: Final = (1, 2, 3, 4, 5)
HEAD: Final = 4096  # bytes of output kept from the start
TAIL: Final = 12288  # bytes of output kept from the end
FIRST_LOOK_S: Final = 2.0  # seconds a long_running command is watched before the call returns
GRACE_S: Final = 2.0  # seconds between SIGTERM and SIGKILL
PIPE_BYTES: Final = 65536  # Linux' pipe capacity: what was written before the status is at most this


@dataclass(frozen=True, slots=True)
class Result:
    """What one tool call gave back.

    ``status``: ``ok``, ``failed (exit N)``, ``running``, ``idle``, ``busy``, ``timeout``
    or ``closed (exit N)`` (the shell itself ended).
    """

    status: str
    stdout: str
    stderr: str
    terminal: int

    def as_dict(self) -> dict[str, object]:
        """The four fields, for JSON."""
        return asdict(self)


class Capture:
    """The head and the tail of a byte stream, and how much was dropped between them. Not thread-safe."""

    def __init__(self, head: int = HEAD, tail: int = TAIL) -> None:
        self._limits = (head, tail)
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0

    def __bool__(self) -> bool:
        return bool(self._head)

    def add(self, data: bytes) -> None:
        """Append; memory stays within head + tail."""
        head, tail = self._limits
        room = head - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > tail:
            self._dropped += len(self._tail) - tail
            del self._tail[:-tail]

    def take(self) -> str:
        """Everything kept, as text, and start afresh."""
        middle = f"\n[{self._dropped} bytes dropped]\n".encode() if self._dropped else b""
        text = (bytes(self._head) + middle + bytes(self._tail)).decode("utf-8", errors="replace")
        self._head.clear()
        self._tail.clear()
        self._dropped = 0
        return text


class Terminal:
    """One shell. It starts with its first command and again after it ended."""

    def __init__(self, number: int, cwd: Path) -> None:
        self._number = number
        self._cwd = cwd
        self._changed = threading.Condition()
        self._out = Capture()
        self._err = Capture()
        self._shell: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._running = False
        self._status = ""  # how the last command ended, until it has been told

    def execute(self, command: str, limit_s: float) -> Result:
        """Run to the end, at most ``limit_s`` seconds; then the terminal is closed."""
        if refused := self._begin(command):
            return refused
        if not self._wait(lambda: not self._running, limit_s):
            self.close()
            self._told()
            return self._result("timeout", f"\n[stopped after {limit_s:.0f} s; this terminal starts afresh]")
        return self._result(self._told())

    def launch(self, command: str) -> Result:
        """Start, and return within ``FIRST_LOOK_S`` whatever it does."""
        if refused := self._begin(command):
            return refused
        self._wait(lambda: not self._running, FIRST_LOOK_S)
        return self._result(self._told())

    def receive(self, wait_s: float) -> Result:
        """What was written since the last look, waiting up to ``wait_s`` seconds for something new."""
        if self._running or self._status:
            self._wait(lambda: bool(self._out) or bool(self._err) or not self._running, wait_s)
        return self._result(self._told())

    def close(self) -> None:
        """End the shell and its process group, and reap it. Harmless if nothing runs."""
        shell, reader = self._shell, self._reader
        if shell is None or reader is None:
            return
        if reader.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
                reader.join(GRACE_S)
                os.killpg(shell.pid, signal.SIGKILL)  # whoever of the group did not listen
            reader.join(GRACE_S)
        self._shell = self._reader = None

    def _begin(self, command: str) -> Result | None:
        """Hand the command to the shell; a result means it was refused."""
        with self._changed:
            if self._running:
                text = f"terminal {self._number} still runs a command; use another one or RECEIVE_MSG"
                return Result("busy", "", text, self._number)
            if self._shell is None or self._reader is None or not self._reader.is_alive():
                self._start()
            self._out.take()
            self._err.take()
            self._status = ""
            self._running = True
            line = f"eval {shlex.quote(command)} </dev/null 3>&-\nprintf '%d\\n' \"$?\" >&3\n"
            stdin = self._shell.stdin if self._shell else None
            if stdin is not None:
                with contextlib.suppress(OSError):  # a shell that just ended is reported by its reader
                    stdin.write(line.encode())
                    stdin.flush()
        return None

    def _start(self) -> None:
        status_read, status_write = os.pipe()
        try:
            shell = subprocess.Popen(
                ["/bin/bash", "--noprofile", "--norc"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self._cwd,
                pass_fds=(status_write,),
                start_new_session=True,
            )
        except BaseException:
            os.close(status_read)
            raise
        finally:
            os.close(status_write)
        if shell.stdin is not None:
            shell.stdin.write(f"exec 3>&{status_write} {status_write}>&-\n".encode())
        self._shell = shell
        self._reader = threading.Thread(target=self._read, args=(shell, status_read), daemon=True)
        self._reader.start()

    def _read(self, shell: subprocess.Popen[bytes], status_fd: int) -> None:
        """Thread: move output into the captures and statuses into place until the shell has ended."""
        streams = [(s, c) for s, c in ((shell.stdout, self._out), (shell.stderr, self._err)) if s is not None]
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            stack.callback(os.close, status_fd)
            for stream, capture in streams:
                stack.callback(stream.close)
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, capture)
            selector.register(status_fd, selectors.EVENT_READ)
            while True:
                ready = [key for key, _ in selector.select()]
                for key in ready:
                    if isinstance(key.data, Capture) and not self._pump(key.fd, key.data, PIPE_BYTES):
                        selector.unregister(key.fileobj)
                if any(key.fd == status_fd for key in ready):
                    said = os.read(status_fd, 256)
                    for stream, capture in streams:
                        self._pump(stream.fileno(), capture, 2 * PIPE_BYTES)
                    if not said:
                        break
                    self._ended(_outcome(said))
        self._finish(shell)

    def _pump(self, fd: int, capture: Capture, limit: int) -> bool:
        """Read what is there, at most ``limit`` bytes; False at the end of the stream."""
        while limit > 0:
            try:
                data = os.read(fd, min(limit, PIPE_BYTES))
            except BlockingIOError:
                return True
            if not data:
                return False
            limit -= len(data)
            with self._changed:
                capture.add(data)
                self._changed.notify_all()
        return True

    def _ended(self, status: str) -> None:
        with self._changed:
            self._running = False
            self._status = status
            self._changed.notify_all()

    def _finish(self, shell: subprocess.Popen[bytes]) -> None:
        """Reap the shell; a command that was running ended with it."""
        code = shell.wait()
        if shell.stdin is not None:
            with contextlib.suppress(OSError):
                shell.stdin.close()
        with self._changed:
            if self._running:
                self._running = False
                self._status = f"closed (exit {code})"
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], limit_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout=min(limit_s, threading.TIMEOUT_MAX))

    def _told(self) -> str:
        """The status to report now; an ended command's is reported once, then the terminal is idle."""
        with self._changed:
            if self._running:
                return "running"
            status, self._status = self._status or "idle", ""
            return status

    def _result(self, status: str, more: str = "") -> Result:
        with self._changed:
            return Result(status, self._out.take(), self._err.take() + more, self._number)


class Terminals:
    """The five terminals. Calls on different terminals may come from different threads."""

    def __init__(self, cwd: Path) -> None:
        self._all = {number: Terminal(number, cwd) for number in TERMINALS}
        self._closed = False

    def execute(self, number: int, command: str, limit_s: float) -> Result:
        """See :meth:`Terminal.execute`."""
        return self._refused(number) or self._all[number].execute(command, limit_s)

    def launch(self, number: int, command: str) -> Result:
        """See :meth:`Terminal.launch`."""
        return self._refused(number) or self._all[number].launch(command)

    def receive(self, number: int, wait_s: float) -> Result:
        """See :meth:`Terminal.receive`."""
        return self._all[number].receive(wait_s)

    def close(self) -> None:
        """Close all of them for good: a run that is still on gets no new shell."""
        self._closed = True
        for terminal in self._all.values():
            terminal.close()

    def _refused(self, number: int) -> Result | None:
        return Result("closed", "", "the terminals are closed", number) if self._closed else None


def _outcome(said: bytes) -> str:
    """The words for an exit status as the shell printed it."""
    code = said.split(b"\n", 1)[0].decode("ascii", errors="replace")
    return "ok" if code == "0" else f"failed (exit {code})"
