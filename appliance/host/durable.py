"""Files that are still there, and whole, after a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a new file, and return only when its content is on the disk. Its name is not: see :func:`sync_folder`.

    Raises:
        FileExistsError: there is a file of that name.
        OSError: it could not be written; it may be there in part.
    """
    with path.open("x") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Return only when the names in a folder are on the disk.

    Raises:
        OSError: it is no folder, or the disk failed.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
