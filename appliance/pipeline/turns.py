"""Whose turn it is. Pure but for its own state; the caller holds the lock.

Two rules:

1. Batches take turns. The first that waits of every batch comes before the second of any, and so on; within
   a batch, and between those without one, it is first come, first served. So one request comes after at
   most one of each batch, however long the batches are.
2. Who does not fit may be overtaken by those behind it who do, so that room is not left empty, but three
   times at most. After that everyone behind it waits, so room gathers and a large request is not kept
   waiting for ever by small ones.

Who would not fit even if nothing of ours ran is passed by without limit: no waiting of others helps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from appliance.pipeline.admission import Verdict

OVERTAKEN_AT_MOST = 3


@dataclass
class _Entry:
    key: str
    batch: str
    round: int
    arrival: int
    overtaken: int = 0


class Turns:
    """Those who wait, by key."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._round = -1
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: str, batch: str = "") -> None:
        """Somebody new; those without a batch share one."""
        # Never the present round: those who came before and wait for the next one would be passed for ever
        # by an endless stream of new batches.
        turn = max([self._round, *(e.round for e in self._entries if e.batch == batch)]) + 1
        self._arrivals += 1
        self._entries.append(_Entry(key, batch, turn, self._arrivals))
        self._entries.sort(key=lambda e: (e.round, e.arrival))

    def remove(self, key: str) -> None:
        """Somebody no longer waits."""
        self._entries = [e for e in self._entries if e.key != key]

    def order(self) -> list[str]:
        """Keys, next one first."""
        return [e.key for e in self._entries]

    def pick(self, ask: Callable[[str], Verdict]) -> str | None:
        """The next one who may start, no longer waiting; ``ask`` is called in order and must keep its promise.

        None if nobody may: all that fit are behind one who was overtaken often enough.
        """
        passed: list[_Entry] = []
        for entry in list(self._entries):
            verdict = ask(entry.key)
            if verdict is Verdict.ADMIT:
                for other in passed:
                    other.overtaken += 1
                self._round = max(self._round, entry.round)
                self.remove(entry.key)
                return entry.key
            if verdict is Verdict.WAIT:
                if entry.overtaken >= OVERTAKEN_AT_MOST:
                    return None
                passed.append(entry)
        return None
