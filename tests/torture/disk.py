"""A small file system of a home's own, on a loop device: it can be filled and broken without hurting the host."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

_TRIES = 20


def _run(*argv: str | os.PathLike[str], check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv))}: {done.stderr.strip()}")
    return done.stdout.strip()


class LoopDisk:
    """An ext4 in a sparse file, mounted at a folder."""

    def __init__(self, file: Path, folder: Path, size: int = 24 << 30) -> None:
        self.file = file
        self.folder = folder
        self.size = size
        self._filler = folder / "filler"

    @property
    def device(self) -> str:
        """The loop device; "" while it is not mounted."""
        return _run("findmnt", "-no", "SOURCE", self.folder, check=False)

    def mount(self) -> None:
        """Make it if there is none, and mount it."""
        if self.device:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            with self.file.open("wb") as f:
                f.truncate(self.size)
            _run("mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard", self.file)
        _run("mount", "-o", "loop,errors=remount-ro", self.file, self.folder)

    def unmount(self) -> None:
        """Take it out; the loop device goes with the mount."""
        if self.device:
            _run("umount", self.folder)

    def fill(self, leave: int) -> None:
        """Leave at most ``leave`` bytes free, whoever else writes here meanwhile."""
        with self._filler.open("ab") as f:
            for _ in range(_TRIES):
                free = os.statvfs(self.folder)
                amount = free.f_bavail * free.f_frsize - leave
                if amount <= 0:
                    return
                try:
                    os.posix_fallocate(f.fileno(), f.seek(0, os.SEEK_END), amount)
                except (
                    OSError
                ) as e:  # out of space: somebody was quicker, and what is free now is asked again
                    if e.errno != errno.ENOSPC:
                        raise

    def empty(self) -> None:
        """Give the space back."""
        self._filler.unlink(missing_ok=True)

    def break_it(self) -> None:
        """Have the kernel find an error here: nothing can be written then, and what was not synced is lost."""
        name = Path(self.device).name
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a campaign breaks its own disk")

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written any more. (The mount's flags do not tell it.)"""
        try:
            (self.folder / "probe").touch()
        except OSError:
            return True
        (self.folder / "probe").unlink()
        return False

    def repair(self) -> None:
        """Check and mount again. Nobody may use it."""
        self.unmount()
        done = subprocess.run(["e2fsck", "-fy", self.file], capture_output=True, text=True, check=False)
        if done.returncode > 2:
            raise RuntimeError(f"e2fsck: {done.stdout[-500:]}")
        self.mount()
