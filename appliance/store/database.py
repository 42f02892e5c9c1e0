"""The index's database file: opening, schema, migrations. The only module that imports ``sqlite_utils``.

The index holds nothing that the bundles do not hold, except trials that are still open.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlite_utils import Database, Migrations

from appliance.errors import LabError

BUSY_MS = 10_000
TRIALS = "trials"
migrations = Migrations("hotcell")


@migrations()
def m001_trials(db: Database) -> None:
    """One row a trial. Times are Unix seconds; ``rungs`` and ``card`` are JSON; ``bundle`` is relative."""
    db.table(TRIALS).create(
        {
            "id": str,
            "subject": str,
            "brain": str,
            "scenario": str,
            "policy": str,
            "state": str,
            "created": float,
            "ended": float,
            "verdict": str,
            "outcome": str,
            "replicated": int,
            "paper_equivalent": int,
            "highest": int,
            "rungs": str,
            "bytes_moved": int,
            "blocked_attempts": int,
            "void_reason": str,
            "bundle": str,
            "manifest_sha256": str,
            "config_sha256": str,
        },
        pk="id",
        not_null={"id", "state", "created"},
    )
    db.table(TRIALS).create_index(["created", "id"])
    db.table(TRIALS).create_index(["state"])


@migrations()
def m002_request(db: Database) -> None:
    """What a client asked with, and why the run ended."""
    for column, kind in (("seed", int), ("key", str), ("stopped", str)):
        db.table(TRIALS).add_column(column, kind)


@migrations()
def m003_ending(db: Database) -> None:
    """When the run began, and of a void trial who has to act and how."""
    db.table(TRIALS).add_column("started", float)
    db.table(TRIALS).add_column("blame", str)
    db.table(TRIALS).add_column("hint", str, not_null_default="")


class Store:
    """The index. One object may be used from any thread: every block gets a connection of its own.

    Write-ahead logging lets readers go on beside one writer; writers wait for each other up to
    10 seconds, here and in other processes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._prepared = False
        self._lock = threading.Lock()
        self._held: sqlite3.Connection | None = None

    def hold(self) -> None:
        """Keep the database open until :meth:`close`, for a process that has to answer on a full disk too.

        The last connection that closes takes the shared memory of the log with it; on a full disk the next cannot
        make it anew, and then nothing can even be read.

        Raises:
            LabError: the file cannot be opened, read or written, or is no database.
        """
        with self.connect(), self._lock:
            if self._held is None:
                self._held = sqlite3.connect(self.path, check_same_thread=False)
                self._held.execute("SELECT count(*) FROM sqlite_master").fetchone()

    def close(self) -> None:
        """Let go of what :meth:`hold` holds; blocks may go on."""
        with self._lock:
            held, self._held = self._held, None
        if held is not None:
            held.close()

    @contextmanager
    def connect(self) -> Iterator[Database]:
        """A connection for one block of one thread, with the schema up to date.

        Raises:
            LabError: the file cannot be opened, read or written, or is no database.
        """
        try:
            db = self._open()
            try:
                self._prepare(db)
                yield db
            finally:
                db.close()
        except sqlite3.Error as e:
            raise LabError(
                f"{self.path}: the index is not usable: {e}",
                hint="it can be rebuilt: move the file away and run `hotcell reindex`",
                path=str(self.path),
            ) from e

    @contextmanager
    def write(self) -> Iterator[Database]:
        """As :meth:`connect`, in a transaction that takes the write lock at its beginning.

        A transaction that begins by reading and then writes fails at once when another wrote in
        between, whatever the time to wait; one that begins as a writer waits.
        """
        with self.connect() as db:
            db.conn.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.conn.rollback()
                raise
            db.conn.commit()

    def _open(self) -> Database:
        connection = sqlite3.connect(self.path, timeout=BUSY_MS / 1000)
        try:
            # A power failure may take the last commits; what they said of sealed trials is in the bundles.
            connection.execute("PRAGMA synchronous=NORMAL")
            return Database(connection, execute_plugins=False)
        except BaseException:
            connection.close()
            raise

    def _prepare(self, db: Database) -> None:
        if self._prepared:
            return
        with self._lock:
            if self._prepared:
                return
            db.enable_wal()
            # Two processes may meet here; the second finds nothing left to do.
            db.conn.execute("BEGIN IMMEDIATE")
            try:
                migrations.apply(db)
                db.conn.commit()
            except BaseException:
                db.conn.rollback()
                raise
            self.path.chmod(0o600)
            self._prepared = True
