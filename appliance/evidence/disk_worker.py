"""The child that parses a guest's filesystem: ``python -m appliance.evidence.disk_worker``.

Reads a question (JSON) from standard input, limits itself, and writes the answer (JSON) to standard
output. The only module that imports ``dissect``. Run by :mod:`appliance.evidence.disk`.
"""

from __future__ import annotations

import hashlib
import os
import resource
import stat
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from dissect.extfs import ExtFS
from dissect.hypervisor.disk.qcow2 import QCow2

from appliance.evidence.disk import DiskAnswer, DiskQuestion
from appliance.evidence.text import plain
from appliance.trial.records import FoundFile

_MAX_CHAIN = 16
_QCOW2_MAGIC = b"QFI\xfb"
_READ = 1 << 20
_TABLE_READ = 1 << 16  # holds a whole number of inodes of any size
_INODE = struct.Struct("<H2xI100xI")  # i_mode, i_size_lo, i_size_high
_ZEROS = bytes(_TABLE_READ)
_ROOT = 2
_TOLD = 3  # problems that are told one by one


class _Bound(Exception):  # noqa: N818 - not an error: the search met one of its limits
    """A limit of the search was met."""


def open_chain(path: Path, stack: ExitStack, depth: int = 0) -> BinaryIO:
    """A readable stream of a qcow2 overlay over its backing files (or of a raw file).

    The chain is followed here and not by the library: that would look for a qcow2 header inside the
    *guest's* data, and refuses absolute backing names.

    Raises:
        ValueError: the chain is longer than 16 files.
        OSError: a file of the chain cannot be read.
    """
    if depth > _MAX_CHAIN:
        raise ValueError(f"the backing chain is longer than {_MAX_CHAIN} files")
    f = stack.enter_context(path.open("rb"))
    magic = f.read(4)
    f.seek(0)
    if magic != _QCOW2_MAGIC:
        return f
    disk = QCow2(f, allow_no_backing_file=True)
    if disk.needs_backing_file:
        disk.backing_file = open_chain(path.parent / disk.auto_backing_file, stack, depth + 1)
    return cast("BinaryIO", disk.open())


class Inode(NamedTuple):
    """What an inode table says of a file."""

    number: int
    kind: int
    size: int


def used_inodes(fs: ExtFS, on_problem: Callable[[str], None]) -> Iterator[Inode]:
    """Every inode in use, straight from the inode tables: the type bits of its mode, and its size in bytes.

    A file that was unlinked and is still open is among them, and no directory can hide one. A table that
    cannot be read is told to ``on_problem`` and left out.
    Layout: https://docs.kernel.org/filesystems/ext4/inodes.html

    Raises:
        ValueError: inodes of an impossible size.
    """
    size, per_group = fs.sb.s_inode_size, fs.sb.s_inodes_per_group
    if not _INODE.size <= size <= fs.block_size or size & (size - 1):
        raise ValueError(f"inodes of {size} bytes")
    layout = struct.Struct(f"{_INODE.format}{size - _INODE.size}x")
    for group in range(fs.groups_count):
        try:
            # What the library itself does for one inode, up to where it would decode all of it.
            descriptor = fs._read_group_desc(group)  # noqa: SLF001 - there is no public way
            table = descriptor.bg_inode_table_lo | getattr(descriptor, "bg_inode_table_hi", 0) << 32
            for first in range(0, per_group, _TABLE_READ // size):
                count = min(per_group - first, _TABLE_READ // size)
                fs.fh.seek(table * fs.block_size + first * size)
                rows = fs.fh.read(count * size)
                if len(rows) < count * size:
                    raise EOFError(f"the inode table of group {group} is cut short")  # noqa: TRY301
                if rows == _ZEROS[: len(rows)]:  # most of a table; a comparison takes a tenth of the time
                    continue
                for number, row in enumerate(layout.iter_unpack(rows), group * per_group + first + 1):
                    mode, low, high = row
                    if mode:
                        yield Inode(number, stat.S_IFMT(mode), high << 32 | low)
        except MemoryError:
            raise
        except Exception as e:  # noqa: BLE001 - a hostile filesystem may make the parser raise anything
            on_problem(f"group {group}: {type(e).__name__}: {e}")


class Search:
    """One look through a filesystem. Collects what was found, and why it is not complete if it is not."""

    def __init__(self, fs: ExtFS, question: DiskQuestion) -> None:
        self.fs = fs
        self.question = question
        self._examined = 0
        self._problems: list[str] = []
        self._untold = 0
        self._directories: set[int] = set()
        self._candidates: dict[int, list[int]] = {}  # size -> inodes of regular files
        self._found: dict[str, Inode] = {}  # SHA-256 -> one file of that content
        self._names: dict[int, str] = {}  # inode -> one path of it

    def run(self) -> None:
        """Look for files of the right sizes, hash them, and say where those lie that were found.

        Names cost more than all the rest. They come first only where there are more files of one size than are
        hashed, so that the likely ones are among them.
        """
        try:
            self._find_candidates()
        except _Bound as e:
            self._problem(str(e))
        crowded = [n for n in self._candidates.values() if len(n) > self.question.max_hashed]
        self._name({number for numbers in crowded for number in numbers})
        for size in sorted(self._candidates):
            self._hash_candidates(size)
        self._name({i.number for i in self._found.values()} - set(self._names))

    def answer(self) -> DiskAnswer:
        """What is known by now; also after :meth:`run` was broken off."""
        found = [
            FoundFile(path=plain(self._path(i.number), 4096), size=i.size, sha256=sha)
            for sha, i in self._found.items()
        ]
        more = f" (and {self._untold} more)" if self._untold else ""
        return DiskAnswer(
            examined=self._examined,
            found=tuple(sorted(found, key=lambda f: f.path)),
            problem=plain("; ".join(self._problems), 600) + more,
        )

    def _path(self, number: int) -> str:
        return self._names.get(number, f"(inode {number}, without a name)")

    def _find_candidates(self) -> None:
        wanted_sizes = set(self.question.sizes.values())
        for inode in used_inodes(self.fs, self._problem):
            self._examined += 1
            if self._examined > self.question.max_inodes:
                raise _Bound(f"more than {self.question.max_inodes} inodes in use")
            if inode.kind == stat.S_IFDIR:
                self._directories.add(inode.number)
            elif inode.kind == stat.S_IFREG and inode.size in wanted_sizes:
                self._candidates.setdefault(inode.size, []).append(inode.number)

    def _name(self, nameless: set[int]) -> None:
        """Walk breadth first, each directory once, symbolic links never followed, until all have a name.

        A name is for people, and for the order of hashing; what cannot be named here is hashed all the same.
        """
        queue = deque([("", _ROOT, 0)])
        unseen = self._directories - {_ROOT}
        entries = 0
        while queue and nameless:
            parent, inum, depth = queue.popleft()
            try:
                for node in self.fs.get_inode(inum).iterdir():
                    entries += 1
                    if entries > self.question.max_inodes:
                        return
                    path = f"{parent}/{node.filename}"
                    if node.inum in nameless:
                        nameless.discard(node.inum)
                        self._names[node.inum] = path
                    elif node.inum in unseen and depth < self.question.max_depth:
                        unseen.discard(node.inum)
                        queue.append((path, node.inum, depth + 1))
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001, S112 - as above; files of a broken directory stay nameless
                continue

    def _hash_candidates(self, size: int) -> None:
        """Hash files of one size, those with a weight's name first, until all weights of it are found."""
        wanted = {sha for sha, s in self.question.sizes.items() if s == size}
        likely = set(self.question.names.values())
        ordered = sorted(
            self._candidates[size], key=lambda n: (self._path(n).rpartition("/")[2] not in likely, n)
        )
        for count, number in enumerate(ordered):
            if not wanted:
                return
            if count >= self.question.max_hashed:
                self._problem(f"more than {self.question.max_hashed} files of {size} bytes")
                return
            try:
                digest = hash_stream(self.fs.get_inode(number).open(), size)
            except MemoryError:
                raise
            except Exception as e:  # noqa: BLE001 - as above
                self._problem(f"inode {number}: {type(e).__name__}: {e}")
                continue
            if digest in wanted:
                wanted.discard(digest)
                self._found[digest] = Inode(number, stat.S_IFREG, size)

    def _problem(self, text: str) -> None:
        if len(self._problems) < _TOLD:
            self._problems.append(text)
        else:
            self._untold += 1


def hash_stream(stream: BinaryIO, size: int) -> str:
    """SHA-256 of the first ``size`` bytes of a stream, read in pieces."""
    digest = hashlib.sha256()
    left = size
    while left > 0 and (piece := stream.read(min(_READ, left))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def answer(question: DiskQuestion) -> DiskAnswer:
    """Open the disk and do what is asked. Whatever goes wrong is told in the answer."""
    search: Search | None = None
    try:
        with ExitStack() as stack:
            fs = ExtFS(open_chain(Path(question.overlay), stack))
            search = Search(fs, question)
            search.run()
            return search.answer()
    except Exception as e:  # noqa: BLE001 - a hostile filesystem may make the parser raise anything
        known = search.answer() if search else DiskAnswer(examined=0)
        return known.model_copy(update={"problem": plain(f"{type(e).__name__}: {e}", 600)})


def limit(memory: int, cpu_s: int) -> None:
    """Limit this process for good: memory in bytes, processor time in seconds, no written file, no core."""
    for what, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def main() -> int:
    """Read the question, answer it. Exit status 0 also when the disk is broken: that is an answer."""
    question = DiskQuestion.model_validate_json(sys.stdin.buffer.read())
    limit(question.memory, question.cpu_s)
    os.nice(5)
    sys.stdout.buffer.write(answer(question).model_dump_json().encode())
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
