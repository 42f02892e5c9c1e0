"""Evidence files as they grow: an append-only journal, JSON lines, and whole records.

Every write reaches the disk before the call returns. What cannot be written is an
:class:`~appliance.errors.EvidenceError`, so that a full disk makes a trial void and never makes it short.
Numbers that are not finite are written as ``NaN`` and ``Infinity`` and read back as such. None is a guest's: what it
answers or reports is refused where it is read if it holds one.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ValidationError

from appliance.errors import EvidenceError
from appliance.trial.records import JournalEntry

# No entry of ours comes near; a line beyond it is not a journal's.
MAX_LINE = 1 << 20


class Journal:
    """The one writer of a journal file. Safe to use from several threads.

    Opening an existing journal goes on after its last whole entry; a torn last line, which a killed
    process leaves, is cut off first.

    Raises:
        EvidenceError: the file cannot be opened or written, or what it holds is not a journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._failed = False
        try:
            self._fd = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as e:
            raise _failure("opened", path, e) from e
        try:
            whole = self._next = 0
            for _, length in scan_on(path):
                self._next += 1
                whole += length
            os.ftruncate(self._fd, whole)
            _sync_directory(path.parent)
        except OSError as e:
            os.close(self._fd)
            raise _failure("opened", path, e) from e
        except EvidenceError:
            os.close(self._fd)
            raise

    def write(self, event: str, **fields: object) -> JournalEntry:
        """Append one entry, stamped with the host's clock, and return it once it is on disk.

        Raises:
            EvidenceError: it could not be written whole. The journal then takes no further entry,
                since what follows a torn line could not be read.
        """
        with self._lock:
            if self._failed or self._fd < 0:
                raise EvidenceError(f"{self.path}: the journal is closed", path=str(self.path))
            entry = JournalEntry(seq=self._next, at=time.time(), event=event, fields=fields)
            try:
                _write_all(self._fd, _line(entry))
                os.fsync(self._fd)
            except OSError as e:
                self._failed = True
                raise _failure("written", self.path, e) from e
            self._next += 1
            return entry

    def close(self) -> None:
        """Close the file. May be called twice."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> tuple[JournalEntry, ...]:
    """All whole entries of a journal; a torn last line is left out.

    Raises:
        EvidenceError: the file cannot be read, a line is not an entry, or ``seq`` has a gap.
    """
    return tuple(scan(path))


def scan(path: Path) -> Iterator[JournalEntry]:
    """As :func:`read`, one entry at a time: a chatty subject makes some ten thousand."""
    return (entry for entry, _ in scan_on(path))


def scan_on(path: Path, offset: int = 0, seq: int = 0) -> Iterator[tuple[JournalEntry, int]]:
    """Each whole entry from ``offset`` on, where entry ``seq`` begins, and the length in bytes of its line.

    Who follows a journal goes on where it was; from the beginning each time, ten thousand entries would be read anew
    for every one that comes.

    Raises:
        EvidenceError: the file cannot be read, a line is not an entry, or ``seq`` has a gap.
    """
    try:
        with path.open("rb") as f:
            f.seek(offset)
            while line := f.readline(MAX_LINE + 1):
                if not line.endswith(b"\n"):
                    if len(line) > MAX_LINE:
                        raise _too_long(path, seq)
                    return
                yield _entry(path, line, seq), len(line)
                seq += 1
    except OSError as e:
        raise _failure("read", path, e) from e


def append_record(path: Path, record: BaseModel) -> None:
    """Append one record as a JSON line and wait until it is on disk.

    One write call a line on a file opened for appending, so that lines of several threads never mix.

    Raises:
        EvidenceError: it could not be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _write_all(fd, _line(record))
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise _failure("written", path, e) from e


def write_record(path: Path, record: BaseModel | Sequence[BaseModel]) -> None:
    """Write a whole JSON file: beside it first, then on disk, then under its name. Replaces what was there.

    Raises:
        EvidenceError: it could not be written; the old content, if any, is untouched.
    """
    value = (
        record.model_dump(mode="json")
        if isinstance(record, BaseModel)
        else [r.model_dump(mode="json") for r in record]
    )
    write_bytes(path, _json(value, indent=1).encode() + b"\n")


def write_bytes(path: Path, content: bytes, mode: int = 0o600) -> None:
    """As :func:`write_record`, for content that is ready."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            _write_all(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        beside.replace(path)
        _sync_directory(path.parent)
    except OSError as e:
        beside.unlink(missing_ok=True)
        raise _failure("written", path, e) from e


def drop_parts(folder: Path) -> None:
    """Remove what a process that was killed while it wrote a record left beside it: that is no evidence.

    Raises:
        EvidenceError: one cannot be removed.
    """
    for part in folder.glob(".*.part"):
        try:
            part.unlink()
        except OSError as e:
            raise _failure("tidied", part, e) from e


def _line(record: BaseModel) -> bytes:
    return _json(record.model_dump(mode="json")).encode() + b"\n"


def _json(value: object, indent: int | None = None) -> str:
    """ASCII JSON that every reader takes.

    A guest can send half of a surrogate pair; Python's parser and pydantic let it pass, and pydantic's own
    parser then refuses the file: the guest would make its trial void. It becomes a question mark here.
    """
    text = json.dumps(value, ensure_ascii=False)
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return json.dumps(value if clean == text else json.loads(clean), ensure_ascii=True, indent=indent)


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _too_long(path: Path, seq: int) -> EvidenceError:
    return EvidenceError(f"{path}: line {seq + 1} is longer than {MAX_LINE} bytes", path=str(path))


def _entry(path: Path, line: bytes, seq: int) -> JournalEntry:
    try:
        entry = JournalEntry.model_validate_json(line)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        raise EvidenceError(
            f"{path}: line {seq + 1} is not a journal entry: {first['msg']}", path=str(path), line=seq + 1
        ) from e
    if entry.seq != seq:
        raise EvidenceError(
            f"{path}: line {seq + 1} has seq {entry.seq}, expected {seq}: entries are missing",
            path=str(path),
            line=seq + 1,
        )
    return entry


def _failure(verb: str, path: Path, e: OSError) -> EvidenceError:
    return EvidenceError(
        f"{path}: evidence could not be {verb}: {e.strerror or e}",
        hint="check free space and permissions below the home directory",
        path=str(path),
    )
