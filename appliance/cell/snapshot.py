"""A new baseline from a machine that runs: chained on the baseline it was restored from.

A clone's RAM is a private view of its baseline's file and cannot be left out of a stream. So its whole state
is handed over to a twin, on this host, whose RAM lies in a shared file: from then on the twin is a template
like any other, and its RAM file is the new baseline's. For a disk baseline the guest is shut down instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from typing import Any

from appliance.cell import migration
from appliance.cell.baseline import (
    RAM,
    STATE,
    Baseline,
    BaselineKind,
    Site,
    Workshop,
    making,
    publish,
    record_expected,
    require_bootable,
    require_kind,
)
from appliance.cell.baseline.template import new_record, record_cold, shut_down, take_files
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.errors import ConflictError, LabError

_SENTINELS = ("/dev/shm/hotcell-sentinel", "/var/lib/hotcell-sentinel")  # noqa: S108 - in the guest


def snapshot(
    shop: Workshop, cell: Cell, name: str, parent: Baseline, label: str, kind: BaselineKind | None = None
) -> Baseline:
    """Save a machine's present state under ``label``. The machine is used up and has to be restored.

    ``kind`` is the parent's unless it is given.

    Raises:
        PrerequisiteError: it needs firmware that this host has not any more.
        ConflictError: the label is taken, or the machine cannot have a baseline of this kind.
        CapacityError: its RAM may not fit where it is to lie; the machine is untouched.
        LabError: QEMU refused, or the guest did not shut down; the machine is gone then too.
        GuestTamperError: the guest does not answer as an honest one would; nothing was saved.
    """
    began = time.monotonic()
    machine = cell.machine(name)
    kind = kind or parent.kind
    require_kind(machine.spec.machine, kind)
    require_bootable(parent)  # or the machine would be used up for what cannot be started
    of_ram = machine.spec.machine if kind == "ram" else None
    with making(shop, label, cell.id, of_ram, in_use=True) as site:
        if site.final.exists():
            raise ConflictError(f"there is a baseline {label} already", hint="choose another name")
        # The sentinels of this incarnation are part of no baseline: a restore must find none.
        machine.qga.exec(["/bin/rm", "-f", *_SENTINELS])
        chain = parent.expected.chain
        fields: dict[str, Any] = {
            "key": hashlib.sha256(f"{parent.key} {label} {secrets.token_hex(16)}".encode()).hexdigest(),
            "machine": parent.machine, "accelerator": shop.accelerator, "files": {}, "below": {},
            "versions": shop.versions(parent.machine), "folder": site.final, "label": label, "parent": parent.id,
            "created_by": "request",
        }  # fmt: skip
        if kind == "ram":
            fields["expected"] = record_expected(machine, site, chain)
            _save_memory(shop, machine, site)
        else:
            fields["expected"] = record_cold(machine, site.final, chain)
            machine.unplug()
            shut_down(machine)
        cell.give_up(name).destroy(keep_folder=True)
        take_files(machine, site)
        return publish(new_record(kind, site, began, fields), site.folder)


def _save_memory(shop: Workshop, machine: Incarnation, site: Site) -> None:
    twin: Incarnation | None = None
    machine.qga.exec(["/bin/sync"], timeout_s=120)
    machine.unplug()
    machine.pause()
    try:
        twin = shop.prepare_twin(machine, site.memory / RAM)
        twin.start()
        twin.open_port()  # as at the machine that hands over to it
        migration.hand_over(machine, twin)
        migration.save_state(twin, site.memory / STATE)
        twin.destroy()
        twin = None
    finally:
        if twin is not None:
            with contextlib.suppress(LabError):
                twin.destroy()
