"""Find and remove everything of ours that should not be there: by ledger row and owner tag, never by pattern.

Also what libvirt itself can leave: a capability probe that was interrupted leaves a daemonised QEMU whose
monitor socket lies below our root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from appliance.cell import netlink
from appliance.cell.domain import OWNER_NS
from appliance.cell.incarnation import is_domain_process, kill_domain_process
from appliance.cell.ledger import Kind, Ledger, Thing
from appliance.cell.libvirt_door import DomainState, Libvirt
from appliance.errors import HotcellError
from appliance.host.clock import wait_until
from appliance.host.paths import Paths
from appliance.model import Frozen


class Stray(Frozen):
    """One thing that was found, and what became of it."""

    kind: str
    name: str
    owner: str
    removed: bool
    problem: str


def find_strays(paths: Paths, libvirt: Libvirt, ledger: Ledger, in_use: set[str]) -> list[Stray]:
    """Everything of ours that no owner in ``in_use`` (cell ids) accounts for."""
    # Processes are looked at first: one that starts meanwhile is not seen, and every earlier one has its row.
    processes = _qemu_of_root(paths.libvirt)
    rows = ledger.things()
    domains = libvirt.list_domains(OWNER_NS)
    known = {(t.kind, t.name) for t in rows}
    accounted = {d.name for d in domains}
    accounted |= {t.name for t in rows if t.kind is Kind.DOMAIN and t.owner in in_use}
    strays = [_found(t.kind, t.name, t.owner) for t in rows if _abandoned(t, in_use)]
    # Every domain under our own root with our tag is ours; one without the tag is somebody else's.
    strays += [_found(Kind.DOMAIN, d.name) for d in domains if d.owner and (Kind.DOMAIN, d.name) not in known]
    strays += [
        _found(Kind.PROCESS, f"{pid} {label}")
        for pid, label in processes
        if not any(is_domain_process(pid, name) for name in accounted)
    ]
    strays += [
        _found(Kind.FOLDER, str(folder), folder.parent.name)
        for folder in _cell_folders(paths)
        if (Kind.FOLDER, str(folder)) not in known and folder.parent.name not in in_use
    ]
    return strays


def _abandoned(thing: Thing, in_use: set[str]) -> bool:
    return thing.kind is not Kind.TRIAL and thing.owner not in in_use


def _found(kind: Kind, name: str, owner: str = "") -> Stray:
    return Stray(kind=kind, name=name, owner=owner, removed=False, problem="")


def _qemu_of_root(root: Path) -> list[tuple[int, str]]:
    """QEMU processes whose command line names a file below our libvirt root."""
    prefix, found = os.fsencode(root) + b"/", []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if argv and argv[0].rpartition(b"/")[2].startswith(b"qemu-system") and any(prefix in a for a in argv):
            probe = any(a.startswith(b"none") for a in argv)
            found.append((int(entry.name), "libvirt capability probe" if probe else "qemu"))
    return found


def _cell_folders(paths: Paths) -> list[Path]:
    if not paths.cells.exists():
        return []
    return [m for c in paths.cells.iterdir() if c.is_dir() for m in c.iterdir()]


_ORDER = (Kind.TAP, Kind.DOMAIN, Kind.PROCESS, Kind.ANCHOR, Kind.BRIDGE, Kind.FOLDER)


def remove(strays: list[Stray], paths: Paths, libvirt: Libvirt, ledger: Ledger) -> list[Stray]:
    """Remove strays: links are cut first, then machines, then what they used.

    One failure never stops the rest; it is told in the stray's ``problem``, and its row stays.
    """
    done = []
    for stray in sorted(strays, key=lambda s: _ORDER.index(Kind(s.kind)) if s.kind in _ORDER else 99):
        try:
            _REMOVERS[Kind(stray.kind)](stray, paths, libvirt)
            ledger.strike(Kind(stray.kind), stray.name)
            done.append(stray.model_copy(update={"removed": True}))
        except (HotcellError, OSError, KeyError, ValueError) as e:
            done.append(stray.model_copy(update={"problem": str(e)}))
    _remove_empty_cells(paths)
    return done


def _remove_domain(stray: Stray, paths: Paths, libvirt: Libvirt) -> None:
    del paths
    kill_domain_process(libvirt.pid(stray.name), stray.name)
    libvirt.destroy(stray.name)
    wait_until(
        lambda: libvirt.state(stray.name) is DomainState.GONE, 30, f"{stray.name} to be gone", interval=0.02
    )


def _remove_process(stray: Stray, paths: Paths, libvirt: Libvirt) -> None:
    del libvirt
    pid = int(stray.name.split(" ")[0])
    if any(pid == p for p, _ in _qemu_of_root(paths.libvirt)):
        os.kill(pid, signal.SIGKILL)


def _remove_link(stray: Stray, paths: Paths, libvirt: Libvirt) -> None:
    del paths, libvirt
    netlink.delete_link(stray.name)


def _remove_folder(stray: Stray, paths: Paths, libvirt: Libvirt) -> None:
    del libvirt
    folder = Path(os.path.normpath(stray.name))
    if not any(root in folder.parents for root in (paths.cells, paths.baselines)):
        raise OSError(f"{folder} is not below {paths.cells} or {paths.baselines}; not touched")
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


_REMOVERS: dict[Kind, Callable[[Stray, Paths, Libvirt], None]] = {
    Kind.DOMAIN: _remove_domain,
    Kind.PROCESS: _remove_process,
    Kind.TAP: _remove_link,
    Kind.BRIDGE: _remove_link,
    Kind.ANCHOR: _remove_link,
    Kind.FOLDER: _remove_folder,
}


def _remove_empty_cells(paths: Paths) -> None:
    for cell in paths.cells.iterdir() if paths.cells.exists() else ():
        with contextlib.suppress(OSError):  # not empty, or a machine is moving in
            cell.rmdir()
