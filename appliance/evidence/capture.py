"""The packet capture of a cell's segment, and the proof that it worked.

A capture is believed only between two *known frames*: random, sent by us on the captured interface,
and found again in the file. Both must be there and nothing may be dropped in between.
Everything happens in the network namespace the process is in.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from appliance.cell import processes
from appliance.cell.ledger import Kind, Ledger
from appliance.errors import CaptureError, CommandError, HotcellError
from appliance.host import command
from appliance.trial.records import CaptureHealth

# IEEE 802 local experimental ethertype 1: no stack answers it.
KNOWN_ETHERTYPE = 0x88B5
SNAPLEN = 192  # every header we read, and nothing of the weights
MAX_BYTES = 512 << 20  # about 2.4 million packets of 192 bytes
# Of it: from here on whoever watches has to cut the segment. Between two looks a quarter of a second apart even
# a guest under KVM fills no more than a fifth of the rest.
_FULL_AT = 0.5
_KERNEL_BUFFER_KIB = 16384
_NONCE = 32
_POLL_S = 0.02
_COUNTER = re.compile(
    r"^(\d+) packets? (captured|received by filter|dropped by kernel|dropped by interface)$", re.MULTILINE
)


class Capture:
    """One tcpdump on one interface, from :meth:`start` to :meth:`finish`.

    Its row is in the ledger before tcpdump is started, under the file that tcpdump is told to write: whoever
    finds the row alone can find the process by that. Pid and start time follow once they are known.

    As a context manager it only makes sure that tcpdump is gone at the end; call ``finish`` for the
    health. ``max_bytes`` is enforced by the kernel (a file size limit on tcpdump), so a guest that
    floods the segment cannot fill the host's disk: the capture ends and is then not healthy.
    """

    def __init__(
        self,
        interface: str,
        path: Path,
        ledger: Ledger,
        owner: str,
        *,
        max_bytes: int = MAX_BYTES,
        wait_s: float = 10.0,
    ) -> None:
        self.interface = interface
        self.path = path
        self._ledger = ledger
        self._owner = owner
        self.max_bytes = max_bytes
        self.wait_s = wait_s
        self._process: command.Process[bytes] | None = None
        self._started = 0.0
        self._first_seen = False
        self._health: CaptureHealth | None = None

    @property
    def _errors(self) -> Path:
        return self.path.with_name(self.path.name + ".log")

    def start(self) -> Self:
        """Start, and return once a known frame was sent and found in the file.

        Raises:
            CaptureError: tcpdump is missing, ended, or did not write the known frame
                within ``wait_s`` seconds.
        """
        if self._process is not None:
            raise CaptureError(f"{self.path}: the capture was started before", path=str(self.path))
        try:
            self._spawn()
            self._started = time.time()
            self._first_seen = self._confirm(offset=0)
        except (CommandError, OSError) as e:
            self.abandon()
            raise CaptureError(f"{self.interface}: the capture could not be started: {e}") from e
        except BaseException:
            self.abandon()
            raise
        if not self._first_seen:
            why = self._why()
            self.abandon()
            raise CaptureError(
                f"{self.interface}: no known frame in the capture within {self.wait_s:.0f} s: {why}",
                hint="the interface must exist and be up in the appliance's network namespace",
                interface=self.interface,
            )
        return self

    def problem(self) -> str:
        """Empty while the capture runs well; else why it cannot be believed. Cheap; made for polling."""
        if self._process is None:
            return "the capture was not started"
        if self._process.poll() is not None:
            return self._why()
        return (
            ""
            if self._size() < self.max_bytes
            else f"the capture outgrew its limit of {self.max_bytes} bytes"
        )

    def full(self) -> bool:
        """Whether it holds half of what it may. Cheap; made for polling."""
        return self._size() >= _FULL_AT * self.max_bytes

    def finish(self) -> CaptureHealth:
        """Send and find a second known frame, stop tcpdump, and say whether the capture can be believed.

        Never raises for a capture that went wrong: that is what the health is for. A second call
        returns the first one's answer.
        """
        if self._health is not None:
            return self._health
        problem = self.problem()
        last_seen = False
        if not problem:
            try:
                last_seen = self._confirm(offset=max(0, self._size() - (1 << 16)))
            except OSError as e:
                problem = f"the last known frame could not be sent: {e}"
        problem = problem or self.problem()
        ended = time.time()
        self._end(signal.SIGINT)
        log = self._log()
        counters = {name: int(number) for number, name in _COUNTER.findall(log)}
        if not problem and "dropped by kernel" not in counters:
            problem = f"tcpdump left no counters: {log[-200:]!r}"
        self._health = CaptureHealth(
            first_seen=self._first_seen,
            last_seen=last_seen,
            packets=counters.get("captured", 0),
            dropped=counters.get("dropped by kernel", 0) + counters.get("dropped by interface", 0),
            started=self._started,
            ended=ended,
            problem=problem,
        )
        return self._health

    def abandon(self) -> None:
        """Stop tcpdump without asking anything of it. May be called at any time."""
        with suppress(HotcellError):  # a row that stays is struck by the next sweep
            self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        """End tcpdump; its row goes once it is seen gone."""
        if self._process is not None:
            command.end(self._process, sig=how)
        self._ledger.strike(Kind.CAPTURE, os.fspath(self.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.abandon()

    def _spawn(self) -> None:
        tcpdump = command.require("tcpdump", "tcpdump")
        prlimit = command.require("prlimit", "util-linux")
        # -Z root: tcpdump would else become its own user, which may not write below the home directory.
        # -U and --immediate-mode: a packet is in the file as soon as the kernel has it.
        argv = [
            prlimit, f"--fsize={self.max_bytes}", "--core=0",
            tcpdump, "-i", self.interface, "-s", str(SNAPLEN), "-B", str(_KERNEL_BUFFER_KIB), "-n",
            "-U", "--immediate-mode", "-Z", "root", "-w", os.fspath(self.path),
        ]  # fmt: skip
        row = (Kind.CAPTURE, os.fspath(self.path), self._owner)
        self._ledger.enter(*row)
        # A file, not a pipe: nobody reads a pipe while the trial runs. Tied to this thread, which is the trial's:
        # a server that is killed takes its capture along.
        with self._errors.open("wb") as errors:
            self._process = command.spawn(argv, stderr=errors, tied=True)
        pid = self._process.pid
        self._ledger.enter(*row, detail=f"{pid} {processes.started(pid)}")

    def _confirm(self, offset: int) -> bool:
        """Send known frames until one of them is in the file, at ``offset`` bytes or later.

        The frame is sent again every half second: tcpdump takes a moment to listen.
        """
        nonce = secrets.token_bytes(_NONCE)
        deadline = time.monotonic() + self.wait_s
        next_send = 0.0
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                return False
            if time.monotonic() >= next_send and self._listening():
                send_known_frame(self.interface, nonce)
                next_send = time.monotonic() + 0.5
            if self._contains(nonce, offset):
                return True
            time.sleep(_POLL_S)
        return False

    def _listening(self) -> bool:
        """True once tcpdump wrote the file's header, which it does after it opened the interface."""
        return self._size() > 0

    def _contains(self, nonce: bytes, offset: int) -> bool:
        """Whether the file holds the nonce at or after ``offset``. Reads in bounded pieces."""
        try:
            with self.path.open("rb") as f:
                f.seek(offset)
                tail = b""
                while piece := f.read(1 << 20):
                    if nonce in tail + piece:
                        return True
                    tail = piece[-_NONCE:]
        except FileNotFoundError:
            pass
        return False

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def _log(self) -> str:
        try:
            return self._errors.read_text(errors="replace")
        except OSError:
            return ""

    def _why(self) -> str:
        status = None if self._process is None else self._process.poll()
        if status is None:
            return "tcpdump runs but did not write it"
        if self._size() >= self.max_bytes:
            return f"the capture outgrew its limit of {self.max_bytes} bytes"
        return f"tcpdump ended early with status {status}: {self._log().strip()[-300:]}"


def send_known_frame(interface: str, nonce: bytes) -> None:
    """Send one frame with the known ethertype, from and to the interface's own address.

    A bridge with an address that is none of its ports' does not forward a frame to itself, so no guest
    sees it. (Without an address of its own, a bridge takes a port's, and that port gets the frame. A guest
    that sees it learns a spent random number.)

    Raises:
        OSError: the interface does not exist, is down, or we may not open packet sockets.
    """
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as s:
        s.bind((interface, 0))
        # /sys/class/net shows the namespace that mounted it; the bound socket knows the right one.
        address = s.getsockname()[4]
        s.send(address + address + KNOWN_ETHERTYPE.to_bytes(2, "big") + nonce)
