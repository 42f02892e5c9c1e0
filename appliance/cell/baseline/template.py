"""A baseline from a booted template: warmed, settled, paused, saved."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from appliance.cell import migration
from appliance.cell.baseline.record import DISK, RAM, STATE, Baseline, publish
from appliance.cell.baseline.workshop import Workshop
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind
from appliance.cell.proof import Expected, GuestFacts, guest_facts
from appliance.cell.spec import MachineSpec
from appliance.errors import LabError
from appliance.host.clock import wait_until

_AGENT_LIMIT_S = 180.0
_SETTLE_S = 3.5
_NONCE_PATH = "/run/hotcell-baseline"
Warm = Callable[[Incarnation], None]


def make(
    shop: Workshop,
    machine: MachineSpec,
    cell: str,
    key: str,
    warm: Warm,
    on_template: Callable[[Incarnation], None] = lambda _t: None,
) -> Baseline:
    """Boot a machine from its image, let ``warm`` bring it to the wanted state, save it.

    The template stays plugged into whatever segment ``cell`` is, alone. Nothing is left on failure.
    ``on_template`` gets the template as soon as it exists; killing it ends the making.

    Raises:
        LabError: booting, warming or saving failed.
    """
    began = time.monotonic()
    template: Incarnation | None = None
    with making(shop, f"{machine.name}-{key[:12]}", cell) as (folder, final):
        try:
            template = shop.prepare(
                machine, cell, backing=machine.image.disk, ram=folder / RAM, incoming=False
            )
            on_template(template)
            template.start()
            template.plug()
            template.resume()
            template.wait_for_agent(_AGENT_LIMIT_S)
            warm(template)
            expected = record_expected(template, final, (machine.image.disk,))
            template.pause()
            migration.save_state(template, folder / STATE)
            template.destroy(keep_folder=True)
            template.spec.overlay.rename(folder / DISK)
            template.remove_folder()
            template = None
            record = Baseline(
            key=key, machine=machine, accelerator=shop.accelerator, expected=expected, files={},
            created=time.time(), seconds=time.monotonic() - began, versions=shop.libvirt.versions(), folder=final,
        )  # fmt: skip
            return publish(record, folder)
        finally:
            if template is not None:
                with contextlib.suppress(LabError):
                    template.destroy()


@contextlib.contextmanager
def making(shop: Workshop, name: str, cell: str) -> Iterator[tuple[Path, Path]]:
    """A folder to make a baseline in, and the one it is to become; the first is gone afterwards."""
    final = shop.paths.baselines / name
    folder = shop.paths.baselines / f".{name}-{secrets.token_hex(4)}"
    shop.ledger.enter(Kind.FOLDER, str(folder), cell)
    folder.mkdir(mode=0o700)
    try:
        yield folder, final
    finally:
        if folder.exists():
            shutil.rmtree(folder)
        shop.ledger.strike(Kind.FOLDER, str(folder))


def record_expected(template: Incarnation, final: Path, below: Sequence[Path]) -> Expected:
    """What a machine that is about to be saved will be held against; ``below`` are the layers under its own."""
    nonce = secrets.token_hex(16)
    template.qga.write_file(_NONCE_PATH, nonce.encode())
    facts = _settled_facts(template)
    return Expected(
        boot_id=facts.boot_id,
        nonce=nonce,
        processes=tuple(facts.processes),
        chain=(final / DISK, *below),
        ram_file=final / RAM,
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
