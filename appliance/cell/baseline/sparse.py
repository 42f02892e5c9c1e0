"""Large files with holes: copied or hashed without reading the holes, and what is zero stays a hole."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from appliance.errors import ConfigError

_PIECE = 1 << 20
_GRAIN = 64 << 10  # a hole is made of no less; a file system's block is at most this
_ZEROS = bytes(_PIECE)
Progress = Callable[[int], None]


def copy(source: Path, target: Path, progress: Progress) -> tuple[str, int]:
    """Copy a plain file to a new one; returns sha256 and size of what was copied.

    ``progress`` gets the bytes that are behind us, holes included.

    Raises:
        ConfigError: the source is a link or nothing that can be read to an end.
        OSError: reading or writing failed; the target may be there in part.
    """
    found, size = hashlib.sha256(), 0
    with _plain(source) as f, target.open("xb") as out:
        length = os.fstat(f.fileno()).st_size
        for at, piece in _pieces(f.fileno(), length):
            found.update(piece)
            _write(out.fileno(), at, piece)
            size = at + len(piece)
            progress(size)
        out.truncate(size)
        out.flush()
        os.fsync(out.fileno())
    return found.hexdigest(), size


def digest(path: Path) -> str:
    """sha256 of a file, as hex. Reading a hole would have the kernel make and clear a page for each of its own.

    Raises:
        OSError: reading failed.
    """
    found, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb") as f:
        number = f.fileno()
        for start, end, is_data in _extents(number, os.fstat(number).st_size):
            at = start
            while at < end:
                piece = buffer[: min(_PIECE, end - at)]
                if is_data:
                    got = os.preadv(number, [piece], at)
                    if not got:
                        return found.hexdigest()  # it was cut while we read
                    found.update(piece[:got])
                else:
                    got = len(piece)
                    found.update(_ZEROS[:got])
                at += got
    return found.hexdigest()


def _plain(source: Path) -> BinaryIO:
    try:
        # O_NONBLOCK: opening a named pipe would wait for its writer.
        number = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise ConfigError(f"{source} cannot be read: {e.strerror}", hint="check the folder") from e
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ConfigError(f"{source} is not a plain file", hint="copy the folder again, without links")
    return os.fdopen(number, "rb")


def _extents(number: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """Where a file has data and where holes: start, end, whether it is data."""
    at = 0
    while at < length:
        start = _seek(number, at, os.SEEK_DATA, length)
        if at < start:
            yield at, start, False
        at = _seek(number, start, os.SEEK_HOLE, length)
        if start < at:
            yield start, at, True


def _pieces(number: int, length: int) -> Iterator[tuple[int, bytes]]:
    """The content, piece by piece with its place; holes are not read but given as zeros."""
    for start, end, is_data in _extents(number, length):
        at = start
        while at < end:
            size = min(_PIECE, end - at)
            piece = os.pread(number, size, at) if is_data else _ZEROS[:size]
            if not piece:
                return  # it was cut while we read; its digest will tell
            yield at, piece
            at += len(piece)


def _seek(number: int, at: int, whence: int, length: int) -> int:
    try:
        return min(length, os.lseek(number, at, whence))
    except OSError as e:
        if e.errno == errno.ENXIO:  # nothing but a hole follows
            return length
        raise


def _write(number: int, at: int, piece: bytes) -> None:
    if piece == _ZEROS[: len(piece)]:
        return
    view = memoryview(piece)
    for start in range(0, len(piece), _GRAIN):
        grain = view[start : start + _GRAIN]
        if grain != _ZEROS[: len(grain)]:
            while grain:
                written = os.pwrite(number, grain, at + start)
                grain, start = grain[written:], start + written
