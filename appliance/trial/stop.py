"""Stopping a trial from outside: one flag that every wait of the runner looks at."""

from __future__ import annotations

import threading


class TrialAborted(Exception):  # noqa: N818 - a request is not an error
    """Raised in the runner's thread at the next safe point after a request to stop."""


class StopFlag:
    """Set once, with a reason; the first reason stays."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self.reason = ""
        self.failure = False

    def set(self, reason: str, *, failure: bool = False) -> None:
        """Ask the trial to stop; ``failure`` if it is not wanted by anyone but cannot go on."""
        with self._lock:
            if not self._event.is_set():
                self.reason, self.failure = reason, failure
                self._event.set()

    @property
    def requested(self) -> bool:
        """True once somebody asked."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise TrialAborted if somebody asked."""
        if self._event.is_set():
            raise TrialAborted(self.reason)

    def sleep(self, seconds: float) -> None:
        """Wait, but wake and raise at once when somebody asks."""
        if self._event.wait(max(0.0, seconds)):
            raise TrialAborted(self.reason)
