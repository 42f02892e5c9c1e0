"""Where baseline files may lie outside of the home: a tmpfs that the user names, and exports in the making.

Such a folder carries a mark that names its home, so that a sweep can tell what is ours from what is not.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from appliance.cell.spec import short_id
from appliance.errors import ConfigError
from appliance.host.paths import Paths

MARK = ".hotcell-home"
_MOUNTS = Path("/proc/self/mountinfo")


def memory_root(paths: Paths, setting: Path | None) -> Path | None:
    """This home's own folder below ``setting``, made if needed; None if RAM files lie in the home.

    Raises:
        ConfigError: the folder is missing, on no tmpfs, or somebody else can write to ours.
    """
    if setting is None:
        return None
    key = "baselines.memory_dir"
    if not setting.is_dir():
        raise ConfigError(f"{key}: {setting} is not a directory", hint="make it, or leave the key out")
    kind = file_system(setting)
    if kind != "tmpfs":
        raise ConfigError(
            f"{key}: {setting} lies on {kind or 'an unknown file system'}, it has to be tmpfs",
            hint="name a folder below /dev/shm, or mount a tmpfs there; leave the key out to use the disk",
        )
    root = setting / f"hotcell-{short_id('memory', str(paths.home))}"
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{key}: {root} is not a directory of ours alone", hint="remove it, or name another folder"
        )
    mark(paths, root)
    return root


def mark(paths: Paths, folder: Path) -> None:
    """Write down in a folder that what lies in it is this home's."""
    (folder / MARK).write_text(f"{paths.home}\n")


def marked(paths: Paths, folder: Path) -> bool:
    """Whether a folder outside of the home is ours: it, or the one it lies in, carries our mark.

    Only marks that nobody but us could write are believed.
    """
    for place in (folder, folder.parent):
        try:
            own = place.lstat()
            text = (place / MARK).read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if own.st_uid == os.geteuid() and not own.st_mode & 0o022 and text == f"{paths.home}\n":
            return True
    return False


def file_system(path: Path, mounts: Path = _MOUNTS) -> str:
    """Type of the file system that ``path`` lies on, such as ``tmpfs``; "" if it cannot be told.

    https://www.kernel.org/doc/html/latest/filesystems/proc.html (mountinfo)
    """
    target, best, kind = path.resolve(), -1, ""
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split(" ")[4].replace("\\040", " "))
        if (point == target or point in target.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split(" ")[0]  # of two on one place the later is on top
    return kind
