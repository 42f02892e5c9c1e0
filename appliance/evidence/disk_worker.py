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
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from dissect.extfs import ExtFS
from dissect.hypervisor.disk.qcow2 import QCow2

from appliance.evidence.disk import DiskAnswer, DiskQuestion
from appliance.evidence.text import plain
from appliance.trial.records import FoundFile

_MAX_CHAIN = 16
_QCOW2_MAGIC = b"QFI\xfb"
_READ = 1 << 20
_INODE = struct.Struct("<H2xI100xI")  # i_mode, i_size_lo, i_size_high
_CACHED_BLOCKS = 1024  # of at most 64 KiB


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


class Inodes:
    """Kind and size of inodes, read straight from the inode tables; decoding all of it takes ten times as long.

    Layout: https://docs.kernel.org/filesystems/ext4/inodes.html
    """

    def __init__(self, fs: ExtFS) -> None:
        self._fs = fs
        self._block = lru_cache(_CACHED_BLOCKS)(self._read_block)

    def kind_and_size(self, number: int) -> tuple[int, int]:
        """The type bits of an inode's mode, and its size in bytes.

        Raises:
            Exception: whatever reading a hostile filesystem may raise.
        """
        sb = self._fs.sb
        group, index = divmod(number - 1, sb.s_inodes_per_group)
        # What the library itself does for an inode, up to where it would decode all of it.
        descriptor = self._fs._read_group_desc(group)  # noqa: SLF001 - there is no public way
        table = descriptor.bg_inode_table_lo | getattr(descriptor, "bg_inode_table_hi", 0) << 32
        block, offset = divmod(index * sb.s_inode_size, self._fs.block_size)
        mode, low, high = _INODE.unpack_from(self._block(table + block), offset)
        return stat.S_IFMT(mode), high << 32 | low

    def _read_block(self, number: int) -> bytes:
        self._fs.fh.seek(number * self._fs.block_size)
        return cast("bytes", self._fs.fh.read(self._fs.block_size))


class Search:
    """One walk over a filesystem. Collects what was found, and why it is not complete if it is not."""

    def __init__(self, fs: ExtFS, question: DiskQuestion) -> None:
        self.fs = fs
        self.question = question
        self.examined = 0
        self.found: dict[str, FoundFile] = {}
        self.problems: list[str] = []
        self._inodes = Inodes(fs)
        self._candidates: dict[int, list[tuple[bool, str, int]]] = {}

    def run(self) -> DiskAnswer:
        """Walk, then hash the candidates."""
        try:
            self._walk()
        except _Bound as e:
            self._problem(str(e))
        for size in sorted(self._candidates):
            self._hash_candidates(size)
        shown = "; ".join(self.problems[:3])
        more = len(self.problems) - 3
        return DiskAnswer(
            examined=self.examined,
            found=tuple(sorted(self.found.values(), key=lambda f: f.path)),
            problem=plain(shown, 600) + (f" (and {more} more)" if more > 0 else ""),
        )

    def _walk(self) -> None:
        """Breadth first, each directory once, symbolic links never followed."""
        wanted_sizes = set(self.question.sizes.values())
        names = set(self.question.names.values())
        queue = deque([("", 2, 0)])
        seen_directories = {2}
        seen_files: set[int] = set()
        while queue:
            parent, inum, depth = queue.popleft()
            try:
                for name, child, kind, size in self._entries(inum):
                    path = f"{parent}/{name}"
                    if kind == stat.S_IFDIR and child not in seen_directories:
                        if depth >= self.question.max_depth:
                            self._problem(f"{path}: deeper than {self.question.max_depth} directories")
                            continue
                        seen_directories.add(child)
                        queue.append((path, child, depth + 1))
                    elif kind == stat.S_IFREG and size in wanted_sizes and child not in seen_files:
                        seen_files.add(child)
                        self._candidates.setdefault(size, []).append((name not in names, path, child))
            except (_Bound, MemoryError):
                raise
            except Exception as e:  # noqa: BLE001 - a hostile filesystem may make the parser raise anything
                self._problem(f"{parent or '/'}: {type(e).__name__}: {e}")

    def _entries(self, inum: int) -> list[tuple[str, int, int, int]]:
        """Name, inode number, kind and size of a directory's entries; broken ones are noted and left out."""
        entries = []
        for node in self.fs.get_inode(inum).iterdir():
            if node.filename in (".", ".."):
                continue
            self.examined += 1
            if self.examined > self.question.max_entries:
                raise _Bound(f"more than {self.question.max_entries} entries")
            try:
                # From the inode and not from the directory entry, which only repeats it.
                entries.append((node.filename, node.inum, *self._inodes.kind_and_size(node.inum)))
            except Exception as e:  # noqa: BLE001 - as above
                self._problem(f"{node.filename}: {type(e).__name__}: {e}")
        return entries

    def _hash_candidates(self, size: int) -> None:
        """Hash files of one size, those with a weight's name first, until all weights of it are found."""
        wanted = {sha for sha, s in self.question.sizes.items() if s == size}
        for number, (_, path, inum) in enumerate(sorted(self._candidates[size])):
            if not wanted:
                return
            if number >= self.question.max_hashed:
                self._problem(f"more than {self.question.max_hashed} files of {size} bytes")
                return
            try:
                digest = hash_stream(self.fs.get_inode(inum).open(), size)
            except MemoryError:
                raise
            except Exception as e:  # noqa: BLE001 - as above
                self._problem(f"{path}: {type(e).__name__}: {e}")
                continue
            if digest in wanted:
                wanted.discard(digest)
                self.found[digest] = FoundFile(path=plain(path, 4096), size=size, sha256=digest)

    def _problem(self, text: str) -> None:
        self.problems.append(text)


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
            return search.run()
    except Exception as e:  # noqa: BLE001 - a hostile filesystem may make the parser raise anything
        found = tuple(search.found.values()) if search else ()
        text = plain(f"{type(e).__name__}: {e}", 600)
        return DiskAnswer(examined=search.examined if search else 0, found=found, problem=text)


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
