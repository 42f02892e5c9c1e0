"""A trial's journal as it grows, also across the moment in which its folder is sealed and moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from appliance.errors import EvidenceError, HotcellError
from appliance.evidence import journal
from appliance.trial.records import JournalEntry

_POLL_S = 0.2
_QUIET_S = 1.0
_ASK_S = 1.0


def follow(path_of: Callable[[], Path], ended: Callable[[], bool], seq: int) -> Iterator[JournalEntry | None]:
    """Entries from ``seq`` on, as they come; None for each second without one; ends with the trial.

    ``path_of`` tells where the journal lies now, ``ended`` whether the trial has.

    Raises:
        EvidenceError: the trial has ended, and its journal cannot be read.
    """
    quiet, size = 0.0, -1
    read, offset = 0, 0
    while True:
        over = ended()  # asked first: what was written before the end is then in the file
        found = 0
        try:
            path = path_of()
            now = path.stat().st_size
            if now != size:
                for entry, length in journal.scan_on(path, offset, read):
                    read, offset, quiet, found = read + 1, offset + length, 0.0, found + 1
                    if entry.seq >= seq:
                        yield entry
            size = now
        except (OSError, HotcellError) as e:
            if over:  # its folder has its last place
                raise _unreadable(e) from e
            size = -1  # it is being sealed: the folder moves to its final name
        if over and not found:
            return
        time.sleep(_POLL_S)
        quiet += _POLL_S
        if quiet >= _QUIET_S:
            quiet = 0.0
            yield None


def seldom(folder: Path, ended: Callable[[], bool]) -> Callable[[], bool]:
    """``ended``, asked once a second only while ``folder`` is there, the open one of a trial.

    A query of the store takes some 3 ms: five a second would be a good part of what the control process may take.
    """
    asked = float("-inf")

    def look() -> bool:
        nonlocal asked
        if folder.exists() and time.monotonic() - asked < _ASK_S:
            return False
        asked = time.monotonic()
        return ended()

    return look


def _unreadable(e: OSError | HotcellError) -> EvidenceError:
    why = e.message if isinstance(e, HotcellError) else str(e)
    return EvidenceError(
        f"the trial has ended, and its journal cannot be read: {why}",
        hint="`hotcell show` tells how it ended",
    )
