"""One making at a time of whatever several requests want, shared by all who ask for it.

Each making runs in a thread of its own, so that it belongs to nobody: who no longer wants it leaves at
once, and it is ended only when the last one has left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Generic, TypeVar

from appliance.errors import LabError

T = TypeVar("T")
_LOOK_S = 0.1


class Making(Generic[T]):
    """One making. The maker calls ``tell`` and ``stoppable``; who waits for it reads ``news``."""

    def __init__(self) -> None:
        self.wanted = 0
        self.ended = False
        self.news: list[tuple[str, float]] = []
        self.result: Future[T] = Future()
        self._lock = threading.Lock()
        self._end: Callable[[], object] | None = None

    def tell(self, detail: str, seconds: float = 0.0) -> None:
        """Something for all who wait."""
        self.news.append((detail, seconds))

    def stoppable(self, end: Callable[[], object]) -> None:
        """From now on ``end`` ends the making.

        Raises:
            LabError: it was asked to end before this was known.
        """
        with self._lock:
            self._end = end
            if self.ended:
                raise LabError("the making was ended", hint="ask again for what was being made")

    def end(self) -> None:
        """End it; who waits gets the maker's error. Safe when repeated."""
        with self._lock:
            self.ended = True
            end = self._end
        if end is not None:
            end()


class Makers(Generic[T]):
    """All makings that go on now, by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Making[T], threading.Thread]] = {}

    def get(
        self,
        key: str,
        make: Callable[[Making[T]], T],
        news: Callable[[str, float], None],
        check: Callable[[], None],
    ) -> T:
        """What ``make`` returns, made once for all who ask for ``key`` meanwhile.

        ``news`` gets what the maker tells, also what it told before this request came; ``check`` is called
        ten times a second, and what it raises ends this request, not the making for others.
        """
        making = self._join(key, make, check)
        told, over = 0, False
        try:
            while not over:
                over = _over(making.result)
                for detail, seconds in making.news[told:]:
                    told += 1
                    news(detail, seconds)
                check()
            return making.result.result()
        finally:
            with self._lock:
                making.wanted -= 1
                abandoned = not making.wanted and not making.result.done()
                making.ended |= abandoned  # under the lock: nobody joins one that is about to end
            if abandoned:
                making.end()

    def _join(self, key: str, make: Callable[[Making[T]], T], check: Callable[[], None]) -> Making[T]:
        while True:
            with self._lock:
                known = self._open.get(key)
                if known is None:
                    making: Making[T] = Making()
                    thread = threading.Thread(
                        target=self._run, args=(key, making, make), name=f"make-{key[:12]}", daemon=True
                    )
                    self._open[key] = making, thread
                    making.wanted = 1
                    thread.start()
                    return making
                if not known[0].ended:
                    known[0].wanted += 1
                    return known[0]
            _over(known[0].result)  # one that was ended has to be gone before it is made again
            check()

    def _run(self, key: str, making: Making[T], make: Callable[[Making[T]], T]) -> None:
        try:
            made = make(making)
        except BaseException as e:  # noqa: BLE001 - it is raised where somebody waits for it
            self._gone(key)
            making.result.set_exception(e)
        else:
            self._gone(key)
            making.result.set_result(made)

    def _gone(self, key: str) -> None:
        with self._lock:
            del self._open[key]

    def end_all(self) -> None:
        """End every making."""
        with self._lock:
            makings = [m for m, _ in self._open.values()]
        for making in makings:
            making.end()

    def wait(self, limit_s: float) -> bool:
        """Wait for what was ended to be gone; False if something is still being made."""
        with self._lock:
            threads = [t for _, t in self._open.values()]
        for thread in threads:
            thread.join(limit_s)
        return not any(t.is_alive() for t in threads)


def _over(result: Future[T]) -> bool:
    with suppress(TimeoutError):
        result.exception(_LOOK_S)
        return True
    return False
