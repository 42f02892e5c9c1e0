"""The process that runs machines: sealed first, then watched, then put in order after whatever was before.

``seal_process`` has to run in the main thread before any other thread exists; everything made afterwards
lives in a network namespace that has no uplink at all.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from appliance.cell import netlink
from appliance.cell.cell import Cell
from appliance.cell.isolation import SealFact, hypervisor_facts, namespace_facts, require_sealed
from appliance.cell.ledger import Ledger
from appliance.cell.libvirt_door import Libvirt
from appliance.cell.sweep import Ground, InUse, Lost, find_strays, remove
from appliance.cell.sweep import Stray as Found
from appliance.errors import ConflictError, SealError
from appliance.host.paths import Paths
from appliance.service import Stray, SweepView

KnownLinks = Callable[[], tuple[set[str], set[str]]]


# Where this process came from; none until it was sealed. No setting and no variable can say that it was.
_left: int | None = None


def _host_namespace() -> int:
    """The namespace that the seal must differ from."""
    return netlink.namespace_inode() if _left is None else _left


def seal_process() -> None:
    """Leave the host's network namespace for a new, empty one, and make sure of it.

    Raises:
        PrerequisiteError: not root.
        SealError: the new namespace is not empty.
    """
    global _left  # one process has one network namespace
    _left = netlink.namespace_inode()
    netlink.unshare_network()
    netlink.without_ipv6_from_now_on()
    require_sealed(seal_facts())


def seal_facts(known: KnownLinks = lambda: (set(), set())) -> list[SealFact]:
    """What this process's namespace is made of, now. ``known`` tells the bridges and taps that belong to cells.

    It is asked before and after the look: a link has its row before it exists and until it is gone, so
    one that another cell is just making or removing is in one of the two answers.
    """
    host, own = _host_namespace(), netlink.namespace_inode()
    bridges, taps = known()
    view = netlink.view()
    more_bridges, more_taps = known()
    apart = SealFact(
        name="the process lives in a namespace of its own",
        passed=own != host,
        found=f"own {own}, host {host}",
    )
    return [apart, *namespace_facts(view, bridges | more_bridges, taps | more_taps)]


def cell_facts(cell: Cell, known: KnownLinks, host_namespace: int) -> list[SealFact]:
    """The whole hypervisor's view before a trial starts: :func:`seal_facts`, and every machine of its cell.

    Raises:
        LabError: a machine cannot be looked at.
    """
    facts = seal_facts(known)
    for machine in cell.machines.values():
        facts += hypervisor_facts(machine, host_namespace)
    return facts


def require_sealed_process() -> int:
    """The host's namespace, after making sure that this process is not in it.

    Raises:
        SealError: the process was not sealed.
    """
    host = _host_namespace()
    if host == netlink.namespace_inode():
        raise SealError("this process is in the host's network namespace", hint="start it by `hotcell serve`")
    return host


def sweep_view(
    paths: Paths, libvirt: Libvirt, ledger: Ledger, in_use: InUse, lost: Lost = set, *, dry_run: bool
) -> SweepView:
    """Find strays and, unless ``dry_run``, remove them.

    ``in_use`` is asked for the cells that are open, ``lost`` for what is left of their machines.
    """
    ground = Ground(paths, libvirt, ledger, links=_left is not None)
    found = find_strays(ground, in_use, lost)
    done = found if dry_run else remove(found, ground)
    return SweepView(dry_run=dry_run, strays=tuple(_view(s, dry_run=dry_run) for s in done))


def _view(stray: Found, *, dry_run: bool) -> Stray:
    if dry_run:
        return Stray(kind=stray.kind, name=stray.name, outcome="found", detail=stray.owner)
    return Stray(
        kind=stray.kind,
        name=stray.name,
        outcome="removed" if stray.removed else "failed",
        detail=stray.problem or stray.owner,
    )


def local_sweep(paths: Paths, dry_run: bool) -> SweepView:
    """Sweep without a server: open the ledger and libvirt here, look, close.

    Raises:
        ConflictError: a server runs; ask it instead.
    """
    if not Path(paths.ledger).exists():
        return SweepView(dry_run=dry_run, strays=())
    if _server_holds(paths):
        raise ConflictError("a server runs in this home", hint="`hotcell sweep` asks it when it answers")
    ledger = Ledger(paths.ledger)
    try:
        libvirt = Libvirt.open_embedded(paths.libvirt)
        try:
            return sweep_view(paths, libvirt, ledger, set, dry_run=dry_run)
        finally:
            libvirt.close()
    finally:
        ledger.close()


def _server_holds(paths: Paths) -> bool:
    """Whether a server, also one that is still starting, holds this home: it locks the directory."""
    fd = os.open(paths.home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
