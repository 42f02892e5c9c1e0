"""Baselines: saved, proven-clean states that reset returns to.

A baseline is a folder of read-only files: ``ram`` (the guest's memory, mapped by its clones), ``state``
(device state, below 1 MiB), ``disk.qcow2`` (the frozen layer) and ``baseline.json`` (the record below).
A clone maps RAM copy-on-write and writes to an overlay of its own, so restoring costs neither copying nor
time in proportion to RAM or to what the last run dirtied.
"""

from appliance.cell.baseline.record import (
    DISK,
    RAM,
    RECORD,
    STATE,
    Baseline,
    FileFact,
    baseline_key,
    check_files,
    file_fact,
    find,
    publish,
    read,
)
from appliance.cell.baseline.restoring import prove, restore
from appliance.cell.baseline.template import Warm, make, making, record_expected
from appliance.cell.baseline.workshop import Workshop

__all__ = [
    "DISK",
    "RAM",
    "RECORD",
    "STATE",
    "Baseline",
    "FileFact",
    "Warm",
    "Workshop",
    "baseline_key",
    "check_files",
    "file_fact",
    "find",
    "make",
    "making",
    "prove",
    "publish",
    "read",
    "record_expected",
    "restore",
]
