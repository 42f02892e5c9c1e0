"""A directory as a tar stream: same files, same bytes; regular files and directories only."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from appliance.errors import EvidenceError

MAX_FILES = 20_000
MAX_BYTES = 64 * 2**30
_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A file or directory; ``name`` is its path in the archive, ``size`` in bytes."""

    name: str
    source: Path
    size: int
    is_dir: bool


def plan(root: Path, prefix: str) -> tuple[Member, ...]:
    """What goes into the archive of ``root``, below ``prefix/``, sorted by name.

    Raises:
        EvidenceError: a link or special file is there, a name does not fit, or it is too much.
    """
    if root.is_symlink() or not root.is_dir():
        raise EvidenceError(f"{root} is not a directory", hint="`hotcell reindex` forgets lost bundles")
    members: list[Member] = [Member(prefix, root, 0, is_dir=True)]
    total = 0
    for directory, dirs, files in os.walk(root):
        dirs.sort()
        for name in sorted([*dirs, *files]):
            source = Path(directory) / name
            if not name.isprintable():
                raise EvidenceError(f"a file of {root} has a name that is not plain text: {name!a}")
            found = source.lstat()
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise EvidenceError(f"{source} is neither a file nor a directory", hint="verify the bundle")
            is_dir = stat.S_ISDIR(found.st_mode)
            size = 0 if is_dir else found.st_size
            total += size
            members.append(Member(f"{prefix}/{source.relative_to(root).as_posix()}", source, size, is_dir))
            if len(members) > MAX_FILES or total > MAX_BYTES:
                raise EvidenceError(
                    f"{root} holds more than {MAX_FILES} files or {MAX_BYTES} bytes", hint="copy it by hand"
                )
    members.sort(key=lambda m: m.name)
    return tuple(members)


def length(members: tuple[Member, ...]) -> int:
    """Bytes that :func:`stream` gives."""
    return sum(len(_header(m)) + _padded(m.size) for m in members) + 2 * _BLOCK


def stream(members: tuple[Member, ...]) -> Iterator[bytes]:
    """The archive, in chunks of at most 1 MiB.

    Raises:
        EvidenceError: a file changed its size since the plan was made; the stream is then too short.
    """
    for member in members:
        yield _header(member)
        if member.is_dir:
            continue
        yield from _content(member)
        yield bytes(_padded(member.size) - member.size)
    yield bytes(2 * _BLOCK)


def _content(member: Member) -> Iterator[bytes]:
    changed = EvidenceError(f"{member.name} changed while it was sent", hint="verify the bundle")
    try:
        fd = os.open(member.source, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as e:
        raise changed from e
    with os.fdopen(fd, "rb") as f:
        if os.fstat(f.fileno()).st_size != member.size:
            raise changed
        left = member.size
        while left:
            chunk = f.read(min(_CHUNK, left))
            if not chunk:
                raise changed
            left -= len(chunk)
            yield chunk


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _header(member: Member) -> bytes:
    info = tarfile.TarInfo(member.name)
    info.size = member.size
    info.mode = 0o755 if member.is_dir else 0o644
    info.type = tarfile.DIRTYPE if member.is_dir else tarfile.REGTYPE
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
