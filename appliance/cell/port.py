"""The host's end of a machine's proof port: lines to and from the script that waits in a restored machine.

A port of its own spares the proof the guest agent, through which a question and its answer are nine commands.
While the host's end is closed, the guest's kernel takes its own end for disconnected and does not wait there; so the
host opens it before a state is saved and before one is loaded.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from appliance.errors import GuestChannelError, GuestTamperError
from appliance.model import printable

_TAKE_S = 5.0


class Port:
    """One open port. Not meant for parallel use.

    Raises:
        GuestChannelError: nobody listens there.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_TAKE_S)
        try:
            self._socket.connect(str(path))
        except OSError as e:
            self._socket.close()
            raise GuestChannelError(f"the port {path} cannot be opened: {e.strerror or e}") from e

    def send(self, line: str) -> None:
        """Send one line, whether anybody reads it or not.

        Raises:
            GuestChannelError: the machine is gone, or took nothing for 5 s.
        """
        try:
            self._socket.settimeout(_TAKE_S)
            self._socket.sendall(f"{line}\n".encode())
        except OSError as e:
            raise GuestChannelError(f"the port of a machine takes nothing: {e.strerror or e}") from e

    def read(self, limit: int, timeout_s: float) -> str:
        """One line of at most ``limit`` bytes, without its end.

        Raises:
            GuestChannelError: none came in time, or the machine is gone.
            GuestTamperError: it is longer, is not UTF-8, or more follows it.
        """
        got, deadline = bytearray(), time.monotonic() + timeout_s
        while b"\n" not in got:
            try:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                piece = self._socket.recv(1 << 16)
            except TimeoutError as e:
                raise GuestChannelError(f"no answer on the port within {timeout_s:.0f} s") from e
            except OSError as e:
                raise GuestChannelError(f"the port of a machine broke off: {e.strerror or e}") from e
            if not piece:
                raise GuestChannelError("the port of a machine was closed")
            got += piece
            if len(got) > limit:
                raise GuestTamperError(f"an answer on the port is longer than {limit} bytes")
        line, _, more = bytes(got).partition(b"\n")
        if more:
            raise GuestTamperError(f"{len(more)} bytes follow an answer on the port")
        try:
            return line.decode()
        except UnicodeDecodeError as e:
            raise GuestTamperError(f"an answer on the port is not UTF-8: {printable(str(e), 80)}") from e

    def close(self) -> None:
        """Hang up; what the guest writes from now on goes nowhere."""
        with contextlib.suppress(OSError):
            self._socket.close()
