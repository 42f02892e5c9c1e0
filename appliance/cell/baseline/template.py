"""A baseline from a booted template: warmed, settled, paused, saved."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from appliance.cell import migration
from appliance.cell.baseline.kinds import (
    DISK,
    NVRAM,
    RAM,
    STATE,
    Baseline,
    BaselineKind,
    ColdExpected,
    CreatedBy,
    DiskBaseline,
    RamBaseline,
    require_kind,
)
from appliance.cell.baseline.record import publish, require_none
from appliance.cell.baseline.workshop import Workshop
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind
from appliance.cell.libvirt_door import DomainState
from appliance.cell.proof import SCRIPT_SHA256, Expected, GuestFacts, guest_facts, leave_waiting
from appliance.cell.spec import MachineSpec
from appliance.errors import GuestChannelError, LabError
from appliance.host.capacity import require_room
from appliance.host.clock import wait_until

AGENT_LIMIT_S = 180.0
_SHUTDOWN_S = 120.0
_TOLD_S = 10.0  # libvirt tells of an end in the moment in which the domain goes
_STATE_BYTES = 64 << 20  # device state is below 1 MiB; the rest is tmpfs's own
_SETTLE_S = 3.5
_NONCE_PATH = "/run/hotcell-baseline"
Warm = Callable[[Incarnation], None]


class Site(NamedTuple):
    """Where a baseline is made, and what it is to become.

    ``memory`` is where RAM and state are written; ``tmpfs`` says that they stay there.
    """

    folder: Path
    final: Path
    memory: Path
    tmpfs: bool

    @property
    def ram_file(self) -> Path:
        """The RAM file's final place."""
        return (self.memory if self.tmpfs else self.final) / RAM


def make(
    shop: Workshop,
    machine: MachineSpec,
    cell: str,
    key: str,
    warm: Warm,
    on_template: Callable[[Incarnation], None] = lambda _t: None,
    *,
    kind: BaselineKind = "ram",
    created_by: CreatedBy = "trial",
) -> Baseline:
    """Boot a machine from its image, let ``warm`` bring it to the wanted state, save it.

    The template stays plugged into whatever segment ``cell`` is, alone. Nothing is left on failure.
    ``on_template`` gets the template as soon as it exists, and again once its process is known; killing it
    ends the making. It may raise.

    Raises:
        ConflictError: a machine with passed-through devices or UEFI was to keep its RAM; or the name is taken.
        CapacityError: the RAM file does not fit where it is to lie.
        LabError: booting, warming or saving failed.
    """
    require_kind(machine, kind)
    began = time.monotonic()
    template: Incarnation | None = None
    with making(shop, f"{machine.name}-{key[:12]}", cell, machine if kind == "ram" else None) as site:
        try:
            ram = site.memory / RAM if kind == "ram" else None
            template = shop.prepare(machine, cell, backing=machine.image.disk, ram=ram, incoming=False)
            on_template(template)
            template.start()
            on_template(template)  # a kill before this had no process to end
            template.plug()
            template.resume()
            template.wait_for_agent(AGENT_LIMIT_S)
            warm(template)
            common: dict[str, Any] = {
                "key": key, "machine": machine, "accelerator": shop.accelerator, "files": {}, "below": {},
                "versions": shop.versions(machine), "folder": site.final, "created_by": created_by,
            }  # fmt: skip
            below = (machine.image.disk,)
            if kind == "ram":
                common |= {"expected": record_expected(template, site, below)}
                template.pause()
                migration.save_state(template, site.memory / STATE)
            else:
                common |= {"expected": record_cold(template, site.final, below)}
                shut_down(template)
            template.destroy(keep_folder=True)
            take_files(template, site)
            template = None
            return publish(new_record(kind, site, began, common), site.folder)
        finally:
            if template is not None:
                with contextlib.suppress(LabError):
                    template.destroy()


def new_record(kind: BaselineKind, site: Site, began: float, fields: dict[str, Any]) -> Baseline:
    """The record of what was saved just now; ``began`` is the monotonic time of the request."""
    fields = fields | {"created": time.time(), "seconds": time.monotonic() - began}
    if kind == "ram":
        return RamBaseline(memory=site.memory if site.tmpfs else None, **fields)
    return DiskBaseline(**fields)


@contextlib.contextmanager
def making(
    shop: Workshop,
    name: str,
    cell: str,
    machine: MachineSpec | None = None,
    *,
    in_use: bool = False,
) -> Iterator[Site]:
    """A place to make a baseline in, and its name; unless it was published, nothing of it is left afterwards.

    ``machine`` is the one whose RAM is to be kept. One that is ``in_use`` would be lost if the disk were full
    midway, so there has to be room for all of it, although its file has holes and mostly takes less.

    Raises:
        ConflictError: there is a baseline of that name, or one is being made.
        CapacityError: the RAM file does not fit where it is to lie.
    """
    with shop.reserve(name):
        require_none(shop.paths.baselines / name)
        if machine is not None:
            _require_room_for_ram(shop, name, machine, in_use=in_use)
        with _place(shop, name, cell, tmpfs=machine is not None and shop.memory is not None) as site:
            yield site


def _require_room_for_ram(shop: Workshop, name: str, machine: MachineSpec, *, in_use: bool) -> None:
    size, purpose = (machine.memory_mib << 20) + _STATE_BYTES, f"the RAM of {name}"
    if shop.memory is not None:
        require_room(shop.memory, memory=size, disk=size, purpose=purpose)
    elif in_use:
        require_room(shop.paths.baselines, memory=0, disk=size, purpose=purpose)


@contextlib.contextmanager
def _place(shop: Workshop, name: str, cell: str, *, tmpfs: bool) -> Iterator[Site]:
    unique = f"{name}-{secrets.token_hex(4)}"
    folder, final = shop.paths.baselines / f".{unique}", shop.paths.baselines / name
    site = Site(folder, final, folder, tmpfs=False)
    if tmpfs and shop.memory is not None:
        site = Site(folder, final, shop.memory / unique, tmpfs=True)
    places = sorted({site.folder, site.memory})
    try:
        for place in places:
            shop.ledger.enter(Kind.FOLDER, str(place), cell)
            place.mkdir(mode=0o700)
        yield site
    finally:
        published = final.exists() and not folder.exists()
        for place in places:
            if place.exists() and not (published and place == site.memory):
                shutil.rmtree(place)
            shop.ledger.strike(Kind.FOLDER, str(place))


def record_expected(template: Incarnation, site: Site, below: Sequence[Path]) -> Expected:
    """What a machine that is about to be saved will be held against; ``below`` are the layers under its own."""
    nonce = _plant_nonce(template)
    leave_waiting(template)
    facts = _settled_facts(template)
    return Expected(
        script=SCRIPT_SHA256,
        boot_id=facts.boot_id,
        nonce=nonce,
        processes=tuple(facts.processes),
        chain=(site.final / DISK, *below),
        ram_file=site.ram_file,
    )


def record_cold(template: Incarnation, final: Path, below: Sequence[Path]) -> ColdExpected:
    """What a machine that boots from this one's disk will be held against."""
    nonce = _plant_nonce(template)
    return ColdExpected(
        boot_id=guest_facts(template.qga, "").boot_id, nonce=nonce, chain=(final / DISK, *below)
    )


def _plant_nonce(template: Incarnation) -> str:
    nonce = secrets.token_hex(16)
    template.qga.write_file(_NONCE_PATH, nonce.encode())
    return nonce


def take_files(machine: Incarnation, site: Site) -> None:
    """Make a baseline's of what a machine that has ended leaves behind: its disk, and its NVRAM if it has one."""
    machine.spec.overlay.rename(site.folder / DISK)
    if machine.spec.nvram is not None:
        machine.spec.nvram.rename(site.folder / NVRAM)
    machine.remove_folder()


def shut_down(machine: Incarnation) -> None:
    """Have a guest power itself off, so that its disk is whole.

    Raises:
        LabError: it did not within 120 s, or ended in another way.
    """
    with machine.watch_end() as powered_off:
        with contextlib.suppress(GuestChannelError):  # the agent may be gone before it answers
            machine.qga.exec(["/bin/sync"], timeout_s=_SHUTDOWN_S)
            machine.qga.exec(["/usr/bin/systemctl", "poweroff", "--no-block"])
        gone = f"{machine.name} to power off"
        wait_until(lambda: machine.state is DomainState.GONE, _SHUTDOWN_S, gone, interval=0.1)
        if not powered_off(_TOLD_S):
            raise LabError(
                f"{machine.name} ended while it was to power off, and not by doing so: its disk may be torn",
                hint="look at the host's memory and kernel log for what killed its QEMU, then ask again",
            )


def _settled_facts(template: Incarnation) -> GuestFacts:
    """Facts once the process list stays the same; udev's workers, which live 3 s idle, have to be gone."""
    seen = [guest_facts(template.qga, "")]

    def stable() -> bool:
        time.sleep(_SETTLE_S)
        seen.append(guest_facts(template.qga, ""))
        workers = any(p.startswith("(udev-worker) ") for p in seen[-1].processes)
        return seen[-1].processes == seen[-2].processes and not workers

    wait_until(stable, 90, f"the process list of {template.name} to stay the same", interval=0)
    return seen[-1]
