"""Baselines: saved, proven-clean states that reset returns to.

A ``ram`` baseline is four read-only files: ``ram`` (the guest's memory, mapped by its clones), ``state``
(device state, below 1 MiB), ``disk.qcow2`` (the frozen layer) and ``baseline.json`` (the record). A clone maps
RAM copy-on-write and writes to an overlay of its own, so restoring costs neither copying nor time in
proportion to RAM or to what the last run dirtied. A ``disk`` baseline has the disk only, and ``nvram.fd`` if the
machine has UEFI firmware; its machines boot.
"""

from appliance.cell.baseline.cold import require_bootable
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
    FileFact,
    RamBaseline,
    require_kind,
    why_cold,
)
from appliance.cell.baseline.record import (
    RECORD,
    baseline_key,
    check_files,
    cpu_fingerprint,
    file_fact,
    find,
    publish,
    read,
    read_all,
)
from appliance.cell.baseline.restoring import prove, restore, wake
from appliance.cell.baseline.store import BaselineStore
from appliance.cell.baseline.template import Site, Warm, make, making, record_expected
from appliance.cell.baseline.workshop import Workshop

__all__ = [
    "DISK",
    "NVRAM",
    "RAM",
    "RECORD",
    "STATE",
    "Baseline",
    "BaselineKind",
    "BaselineStore",
    "ColdExpected",
    "CreatedBy",
    "DiskBaseline",
    "FileFact",
    "RamBaseline",
    "Site",
    "Warm",
    "Workshop",
    "baseline_key",
    "check_files",
    "cpu_fingerprint",
    "file_fact",
    "find",
    "make",
    "making",
    "prove",
    "publish",
    "read",
    "read_all",
    "record_expected",
    "require_bootable",
    "require_kind",
    "restore",
    "wake",
    "why_cold",
]
