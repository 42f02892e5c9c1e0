"""A new baseline from a machine that runs: chained on the baseline it was restored from.

A clone's RAM is a private view of its baseline's file and cannot be left out of a stream. So its whole state
is handed over to a twin, on this host, whose RAM lies in a shared file: from then on the twin is a template
like any other, and its RAM file is the new baseline's.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time

from appliance.cell import migration
from appliance.cell.baseline import DISK, RAM, STATE, Baseline, Workshop, making, publish, record_expected
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.errors import LabError


def snapshot(shop: Workshop, cell: Cell, name: str, parent: Baseline, label: str) -> Baseline:
    """Save a machine's present state under ``label``. The machine is used up and has to be restored.

    Raises:
        LabError: the label is taken, or QEMU refused; the machine is gone then too.
        GuestTamperError: the guest does not answer as an honest one would; nothing was saved.
    """
    began = time.monotonic()
    machine = cell.machine(name)
    twin: Incarnation | None = None
    with making(shop, label, cell.id) as (folder, final):
        if final.exists():
            raise LabError(f"there is a baseline {label} already", hint="choose another name")
        # The sentinels of this incarnation are part of no baseline: a restore must find none.
        machine.qga.exec(["/bin/rm", "-f", "/dev/shm/hotcell-sentinel", "/var/lib/hotcell-sentinel"])  # noqa: S108
        expected = record_expected(machine, final, parent.expected.chain)
        machine.qga.exec(["/bin/sync"], timeout_s=120)
        machine.unplug()
        machine.pause()
        try:
            twin = shop.prepare_twin(machine, folder / RAM)
            twin.start()
            migration.hand_over(machine, twin)
            migration.save_state(twin, folder / STATE)
            twin.destroy()
            twin = None
            cell.machines.pop(name).destroy(keep_folder=True)
            machine.spec.overlay.rename(folder / DISK)
            machine.remove_folder()
        finally:
            if twin is not None:
                with contextlib.suppress(LabError):
                    twin.destroy()
        key = hashlib.sha256(f"{parent.key} {label} {secrets.token_hex(16)}".encode()).hexdigest()
        record = parent.model_copy(
            update={
                "key": key, "expected": expected, "files": {}, "created": time.time(), "folder": final,
                "seconds": time.monotonic() - began, "label": label, "parent": parent.id,
            }
        )  # fmt: skip
        return publish(record, folder)
