"""Written down before it exists: one row for every thing we put on the host.

The row is committed (``synchronous=FULL``) before the thing is made and struck only after its removal was
seen. What a crash leaves is therefore always in here. The standard library's sqlite3 is enough: the ledger
has one table, and must open when the store's database does not.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from appliance.errors import LabError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS things (
  id INTEGER PRIMARY KEY,
  kind TEXT NOT NULL,
  name TEXT NOT NULL,
  owner TEXT NOT NULL,
  detail TEXT NOT NULL DEFAULT '',
  made REAL NOT NULL,
  UNIQUE (kind, name)
);
"""
# Ledgers of version 0.1 could hold rows of trials; an open trial is told by its folder.
_NO_LONGER = "DELETE FROM things WHERE kind = 'trial'"


class Kind(StrEnum):
    """What a row stands for."""

    DOMAIN = "domain"
    BRIDGE = "bridge"
    ANCHOR = "anchor"
    TAP = "tap"
    FOLDER = "folder"
    PROCESS = "process"
    CAPTURE = "capture"


class Thing(NamedTuple):
    """One row. ``owner`` is the cell or trial it belongs to; ``detail`` depends on the kind."""

    id: int
    kind: Kind
    name: str
    owner: str
    detail: str
    made: float


class Ledger:
    """The ledger of one home directory; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._path = path
        with self._told():
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            self._db.execute(_NO_LONGER)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """One at a time, and SQLite's errors as ours: nothing may be made that cannot be written down."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as e:
                raise LabError(
                    f"the ledger {self._path} is not usable: {e}",
                    hint="check free space and permissions; it must not be deleted while machines run",
                ) from e

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def enter(self, kind: Kind, name: str, owner: str, detail: str = "") -> None:
        """Write down a thing that is about to be made. Entering it again replaces the row.

        Raises:
            LabError: it could not be written; the thing must not be made.
        """
        with self._told():
            self._db.execute(
                "INSERT OR REPLACE INTO things (kind, name, owner, detail, made) VALUES (?, ?, ?, ?, ?)",
                (kind, name, owner, detail, time.time()),
            )

    def strike(self, kind: Kind, name: str) -> None:
        """Remove the row of a thing that is seen to be gone."""
        with self._told():
            self._db.execute("DELETE FROM things WHERE kind = ? AND name = ?", (kind, name))

    def hand_over(self, things: Sequence[tuple[Kind, str]], owner: str) -> None:
        """Give rows to another owner, all or none: at every moment each has exactly one.

        Raises:
            LabError: a row does not exist, or the ledger could not be written.
        """
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            missing = list(things)
            try:
                missing = [t for t in things if not self._give(t, owner)]
            finally:
                self._db.execute("COMMIT" if not missing else "ROLLBACK")
        if missing:
            raise LabError(f"the ledger has no {missing[0][0]} {missing[0][1]} to hand over to {owner}")

    def _give(self, thing: tuple[Kind, str], owner: str) -> bool:
        done = self._db.execute("UPDATE things SET owner = ? WHERE kind = ? AND name = ?", (owner, *thing))
        return done.rowcount == 1

    def things(self, kind: Kind | None = None, owner: str | None = None) -> list[Thing]:
        """Rows, newest first: the order in which things are to be undone.

        Raises:
            LabError: the ledger cannot be read, or holds a kind of thing that this version does not know.
        """
        query = "SELECT id, kind, name, owner, detail, made FROM things WHERE 1"
        values: list[str] = []
        if kind is not None:
            query, values = query + " AND kind = ?", [*values, kind]
        if owner is not None:
            query, values = query + " AND owner = ?", [*values, owner]
        with self._told():
            rows = self._db.execute(query + " ORDER BY id DESC", values).fetchall()
        try:
            return [Thing(r[0], Kind(r[1]), r[2], r[3], r[4], r[5]) for r in rows]
        except ValueError as e:
            raise LabError(
                f"the ledger {self._path} has a row that this version does not know: {e}",
                hint="it was written by a newer version; sweep with that one",
            ) from e
