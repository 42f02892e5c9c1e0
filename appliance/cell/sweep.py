"""Find and remove everything of ours that should not be there: by ledger row, owner tag and place, never by
a pattern of names.

Also what libvirt itself can leave: a capability probe that was interrupted leaves a daemonised QEMU whose
monitor socket lies below our root. Links are looked at only in a namespace of our own: the name of a row
means nothing in any other.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from appliance.cell import netlink, processes
from appliance.cell.baseline.kinds import RamBaseline
from appliance.cell.baseline.places import marked
from appliance.cell.baseline.record import find_broken, read_all
from appliance.cell.domain import OWNER_NS
from appliance.cell.ledger import Kind, Ledger
from appliance.cell.libvirt_door import DomainState, Libvirt
from appliance.cell.processes import Process, kill_domain_process
from appliance.errors import HotcellError
from appliance.host.clock import wait_until
from appliance.host.paths import Paths
from appliance.model import Frozen

# Ids of cells (also those in which baselines are made) whose things are accounted for.
InUse = Callable[[], set[str]]
# Rows whose things are nobody's, although their owner is in use: true once it was said.
Lost = Callable[[], set[tuple[Kind, str]]]
_GONE_S = 30.0  # a QEMU of 4 GiB was seen to take 1.4 s to end after SIGKILL, on a busy host


class Stray(Frozen):
    """One thing that was found, and what became of it."""

    kind: str
    name: str
    owner: str
    removed: bool
    problem: str


class Ground(NamedTuple):
    """Where a sweep looks. ``links`` says whether this process lives in the sealed namespace."""

    paths: Paths
    libvirt: Libvirt
    ledger: Ledger
    links: bool


class _Seen(NamedTuple):
    """What exists: QEMUs, captures by their file, links, folders; baselines whose record is broken."""

    qemus: list[Process]
    captures: Mapping[Path, Process]
    links: Mapping[str, Kind]
    folders: list[Path]
    broken: list[Path]


def find_strays(ground: Ground, in_use: InUse, lost: Lost = set) -> list[Stray]:
    """Everything of ours that nobody accounts for.

    Things are looked at before rows: each has its row before it exists, so that what is just being made is
    never taken for a stray. And owners are asked before and after: one is known before its first row and
    until its last.
    """
    owners = in_use()
    seen = _look(ground)
    rows = ground.ledger.things()
    domains = ground.libvirt.list_domains(OWNER_NS)
    owners |= in_use()
    nobodys = lost()
    left = [t for t in rows if t.owner not in owners or (t.kind, t.name) in nobodys]
    known = {(t.kind, t.name) for t in rows}
    # Every domain under our own root with our tag is ours; one without the tag is somebody else's.
    accounted = {d.name for d in domains}
    accounted |= {t.name for t in rows if t.kind is Kind.DOMAIN and t not in left}
    kept = _published(ground.paths)
    strays = [
        _found(t.kind, t.name, t.owner) for t in left if t.kind is not Kind.FOLDER or t.name not in kept
    ]
    strays += [_found(Kind.DOMAIN, d.name) for d in domains if d.owner and (Kind.DOMAIN, d.name) not in known]
    strays += [_found(Kind.PROCESS, _told(p)) for p in seen.qemus if not _accounted(p, accounted)]
    strays += [_found(Kind.CAPTURE, str(f)) for f in seen.captures if (Kind.CAPTURE, str(f)) not in known]
    strays += [_found(kind, name) for name, kind in seen.links.items() if not _has_row(name, known)]
    strays += [
        _found(Kind.FOLDER, str(folder), _owner_of(ground.paths, folder))
        for folder in seen.folders
        if (Kind.FOLDER, str(folder)) not in known and _owner_of(ground.paths, folder) not in owners
    ]
    if not owners:  # who is there may use files whose record was lost only now
        strays += [_found(Kind.FOLDER, str(folder)) for folder in seen.broken]
    return [s for s in strays if _still(s, ground, known)]


def _published(paths: Paths) -> set[str]:
    """Folders of RAM that a record names. A crash after their baseline was published leaves their row."""
    return {str(b.memory) for b in read_all(paths) if isinstance(b, RamBaseline) and b.memory}


def _look(ground: Ground) -> _Seen:
    return _Seen(
        processes.qemu_below(ground.paths.libvirt),
        processes.captures_below(ground.paths.home),
        _links() if ground.links else {},
        [*_cell_folders(ground.paths), *_half_made(ground.paths)],
        find_broken(ground.paths),
    )


def _links() -> dict[str, Kind]:
    """Bridges and taps of this namespace. Anything else in it breaks the seal, and is not ours to remove."""
    kinds = {"bridge": Kind.BRIDGE, "tun": Kind.TAP}
    return {link.name: kinds[link.kind] for link in netlink.view().links if link.kind in kinds}


def _has_row(link: str, known: set[tuple[Kind, str]]) -> bool:
    return any((kind, link) in known for kind in (Kind.BRIDGE, Kind.TAP, Kind.ANCHOR))


def _accounted(process: Process, domains: set[str]) -> bool:
    return any(processes.is_domain(process, name) for name in domains)


def _told(process: Process) -> str:
    what = "libvirt capability probe" if processes.is_probe(process) else "qemu"
    return f"{process.pid} {process.start} {what}"


def _found(kind: Kind, name: str, owner: str = "") -> Stray:
    return Stray(kind=kind, name=name, owner=owner, removed=False, problem="")


def _still(stray: Stray, ground: Ground, known: set[tuple[Kind, str]]) -> bool:
    """False for a thing without a row that went away while we looked: its row had just been struck."""
    if (Kind(stray.kind), stray.name) in known:
        return True
    match Kind(stray.kind):
        case Kind.FOLDER:
            return os.path.lexists(stray.name)
        case Kind.PROCESS:
            return processes.look(int(stray.name.split(" ")[0])) is not None
        case Kind.CAPTURE:
            return Path(stray.name) in processes.captures_below(ground.paths.home)
        case Kind.DOMAIN:
            return ground.libvirt.state(stray.name) is not DomainState.GONE
        case _:
            return stray.name in _links()


def _cell_folders(paths: Paths) -> Iterator[Path]:
    if paths.cells.exists():
        for cell in paths.cells.iterdir():
            if cell.is_dir():
                yield from cell.iterdir()


def _half_made(paths: Paths) -> Iterator[Path]:
    """Baselines that never got their final name: those begin with a dot."""
    if paths.baselines.exists():
        yield from (p for p in paths.baselines.iterdir() if p.name.startswith("."))


def _owner_of(paths: Paths, folder: Path) -> str:
    """The cell that a machine's folder lies in; a half-made baseline has no owner but the one in its row."""
    return folder.parent.name if folder.parent.parent == paths.cells else ""


_ORDER = (Kind.TAP, Kind.DOMAIN, Kind.PROCESS, Kind.CAPTURE, Kind.ANCHOR, Kind.BRIDGE, Kind.FOLDER)


def remove(strays: list[Stray], ground: Ground) -> list[Stray]:
    """Remove strays: links are cut first, then machines, then what they used.

    One failure never stops the rest; it is told in the stray's ``problem``, and its row stays.
    """
    done = []
    for stray in sorted(strays, key=lambda s: _ORDER.index(Kind(s.kind)) if s.kind in _ORDER else 99):
        try:
            _REMOVERS[Kind(stray.kind)](stray, ground)
            ground.ledger.strike(Kind(stray.kind), stray.name)
            done.append(stray.model_copy(update={"removed": True}))
        except (HotcellError, OSError, KeyError, ValueError) as e:
            done.append(stray.model_copy(update={"problem": str(e)}))
    _remove_empty_cells(ground.paths)
    return done


def _remove_domain(stray: Stray, ground: Ground) -> None:
    libvirt = ground.libvirt
    kill_domain_process(libvirt.pid(stray.name), stray.name)
    libvirt.destroy(stray.name)
    wait_until(
        lambda: libvirt.state(stray.name) is DomainState.GONE,
        _GONE_S,
        f"{stray.name} to be gone",
        interval=0.02,
    )


def _remove_process(stray: Stray, ground: Ground) -> None:
    pid, start = (int(word) for word in stray.name.split(" ")[:2])
    for process in processes.qemu_below(ground.paths.libvirt):
        if (process.pid, process.start) == (pid, start):
            _end(process)


def _remove_capture(stray: Stray, ground: Ground) -> None:
    process = processes.captures_below(ground.paths.home).get(Path(stray.name))
    if process is not None:
        _end(process)


def _end(process: Process) -> None:
    processes.send(process, signal.SIGKILL)
    wait_until(lambda: processes.gone(process), _GONE_S, f"process {process.pid} to be gone", interval=0.02)


def _remove_link(stray: Stray, ground: Ground) -> None:
    # A link of an earlier namespace went with that namespace, once its last process did.
    if ground.links:
        netlink.delete_link(stray.name)


def _remove_folder(stray: Stray, ground: Ground) -> None:
    paths = ground.paths
    folder = Path(os.path.normpath(stray.name))
    inside = any(root in folder.parents for root in (paths.cells, paths.baselines))
    if not inside and folder.exists() and not marked(paths, folder):
        raise OSError(f"{folder} is not below {paths.cells} or {paths.baselines}; not touched")
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        if folder.parent == paths.baselines and not folder.name.startswith("."):
            if folder not in find_broken(paths):
                raise OSError(f"{folder} is a baseline again; not touched")
            # Half of it would be no stray without its record; under this name it always is.
            folder = folder.rename(folder.with_name(f".{folder.name}-{secrets.token_hex(4)}"))
        shutil.rmtree(folder)


_REMOVERS: dict[Kind, Callable[[Stray, Ground], None]] = {
    Kind.DOMAIN: _remove_domain,
    Kind.PROCESS: _remove_process,
    Kind.CAPTURE: _remove_capture,
    Kind.TAP: _remove_link,
    Kind.BRIDGE: _remove_link,
    Kind.ANCHOR: _remove_link,
    Kind.FOLDER: _remove_folder,
}


def _remove_empty_cells(paths: Paths) -> None:
    for cell in paths.cells.iterdir() if paths.cells.exists() else ():
        with contextlib.suppress(OSError):  # not empty, or a machine is moving in
            cell.rmdir()
