"""Calls that may never return, each with a limit: they run in a thread of their own, which may be left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
# Each call that is overdue holds a thread. So many at once mean that the whole library stands still, and then
# another one would only wait as well.
MOST_OVERDUE = 16


class OverdueError(Exception):
    """A call did not return within its limit, or too many others have not."""


class _Call(Generic[T]):
    """One call: what it gave or raised, and whether it is over."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._value: T
        self._error: BaseException | None = None
        self.over = threading.Event()

    def run(self) -> None:
        """Make the call."""
        try:
            self._value = self._function()
        except BaseException as e:  # noqa: BLE001 - raised again in the thread that asked
            self._error = e
        finally:
            self.over.set()

    def result(self) -> T:
        """What it gave."""
        if self._error is not None:
            raise self._error
        return self._value


class Limited:
    """Makes calls with limits. A thread a call (about 0.1 ms): none is kept, so none can be lost."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._overdue: set[_Call[object]] = set()

    def call(self, function: Callable[[], T], limit_s: float) -> T:
        """What ``function`` returns or raises, if it does so within ``limit_s`` seconds.

        Raises:
            OverdueError: it did not, and goes on in its thread; or it was not begun, since 16 others hang.
        """
        if self.overdue >= MOST_OVERDUE:
            raise OverdueError(f"{MOST_OVERDUE} earlier calls have not returned")
        call = _Call(function)
        threading.Thread(target=call.run, name=self._name, daemon=True).start()
        if not call.over.wait(limit_s):
            with self._lock:
                self._overdue.add(call)  # type: ignore[arg-type] # only whether it is over matters here
            raise OverdueError(f"no answer within {limit_s:g} s")
        return call.result()

    @property
    def overdue(self) -> int:
        """How many calls have not returned in time, and still have not."""
        with self._lock:
            self._overdue = {c for c in self._overdue if not c.over.is_set()}
            return len(self._overdue)
