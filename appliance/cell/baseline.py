"""Baselines: saved, proven-clean states that reset returns to.

A baseline is a folder of read-only files: ``ram`` (the guest's memory, mapped by its clones), ``state``
(device state, below 1 MiB), ``disk.qcow2`` (the frozen layer) and ``baseline.json`` (the record below).
A clone maps RAM copy-on-write and writes to an overlay of its own, so restoring costs neither copying nor
time in proportion to RAM or to what the last run dirtied.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from appliance.cell import migration, overlay
from appliance.cell.incarnation import Incarnation, prepare
from appliance.cell.ledger import Kind, Ledger
from appliance.cell.libvirt_door import Libvirt
from appliance.cell.proof import Check as ProofCheck
from appliance.cell.proof import Expected, GuestFacts, Proof, guest_checks, guest_facts, host_checks
from appliance.cell.spec import MachineSpec
from appliance.errors import GuestChannelError, GuestTamperError, LabError, ResetError
from appliance.host.clock import wait_until
from appliance.host.paths import Paths
from appliance.model import Accelerator, Frozen, printable

RAM, STATE, DISK, RECORD = "ram", "state", "disk.qcow2", "baseline.json"
_PARTS = (RAM, STATE, DISK)
_AGENT_LIMIT_S = 180.0
_SETTLE_S = 3.5
_NONCE_PATH = "/run/hotcell-baseline"
Warm = Callable[[Incarnation], None]


class FileFact(Frozen):
    """A file's content and the signs by which a later change is noticed without reading it again."""

    sha256: str
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int


class Baseline(Frozen):
    """The record of one baseline. ``key`` is what it was made from; equal key, equal baseline."""

    key: str
    machine: MachineSpec
    accelerator: Accelerator
    expected: Expected
    files: dict[str, FileFact]
    created: float
    seconds: float
    versions: dict[str, str]
    folder: Path
    label: str = ""
    parent: str = ""

    @property
    def id(self) -> str:
        """Its name: the label if it was given one, else machine and the first digits of the key."""
        return self.label or f"{self.machine.name}-{self.key[:12]}"


class Workshop:
    """What making and restoring machines needs, in one value."""

    def __init__(
        self, paths: Paths, libvirt: Libvirt, ledger: Ledger, accelerator: Accelerator, owner: str
    ) -> None:
        self.paths = paths
        self.libvirt = libvirt
        self.ledger = ledger
        self.accelerator = accelerator
        self.owner = owner

    def prepare(
        self, machine: MachineSpec, cell: str, *, backing: Path, ram: Path, incoming: bool
    ) -> Incarnation:
        """A new incarnation, not started."""
        return prepare(
            machine, cell, owner=self.owner, backing=backing, ram_file=ram, incoming=incoming,
            accelerator=self.accelerator, paths=self.paths, libvirt=self.libvirt, ledger=self.ledger,
        )  # fmt: skip

    def prepare_twin(self, machine: Incarnation, ram: Path) -> Incarnation:
        """A machine that will take over ``machine``'s state and disk, and keep its RAM in ``ram``."""
        spare = self.prepare(
            machine.spec.machine, machine.cell, backing=machine.spec.overlay, ram=ram, incoming=True
        )
        spare.spec.overlay.unlink()
        spec = spare.spec.model_copy(update={"overlay": machine.spec.overlay, "share_ram": True})
        twin = Incarnation(spec, machine.cell, spare.id, self.libvirt, self.ledger)
        twin.folder = spare.folder
        return twin


def baseline_key(
    machine: MachineSpec, accelerator: Accelerator, versions: dict[str, str], recipe: str
) -> str:
    """sha256 over everything a baseline depends on. ``recipe`` names and versions its warm-up."""
    basis = {
        "machine": machine.model_dump(mode="json"),
        "accelerator": accelerator,
        "versions": versions,
        "recipe": recipe,
        "format": 1,
        "host_cpu": _cpu_model(),
    }
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()


def _cpu_model() -> str:
    """A saved CPU state is only valid on a CPU with the same features."""
    wanted = ("model name", "flags", "microcode")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(x for x in lines if x.split("\t")[0].strip() in wanted)


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


def publish(record: Baseline, folder: Path) -> Baseline:
    """Freeze the files of ``folder``, note what they are, and give them their final place.

    Raises:
        LabError: there is a baseline in that place already.
    """
    for part in _PARTS:
        path = folder / part
        with path.open("rb") as f:
            os.fsync(f.fileno())
        overlay.freeze(path)
    if record.folder.exists():
        if read(record.folder) is not None:
            raise LabError(
                f"there is a baseline {record.id} already", hint="delete it, or choose another name"
            )
        shutil.rmtree(record.folder)
    # Facts are taken after the last change of any inode field; a rename changes only the folder's.
    record = record.model_copy(update={"files": {part: file_fact(folder / part) for part in _PARTS}})
    (folder / RECORD).write_text(record.model_dump_json(indent=1))
    folder.rename(record.folder)
    return record


def file_fact(path: Path) -> FileFact:
    """Read a file once and note its digest and its inode's signs."""
    sha256 = overlay.digest(path)
    stat = path.stat()
    return FileFact(
        sha256=sha256,
        size=stat.st_size,
        inode=stat.st_ino,
        mtime_ns=stat.st_mtime_ns,
        ctime_ns=stat.st_ctime_ns,
    )


def read(folder: Path) -> Baseline | None:
    """The record of a baseline's folder; an unreadable one counts as none, and so does one of another place.

    A home that was copied holds records that name the files of the first: those are not this home's to use,
    and least of all to remove.
    """
    try:
        record = Baseline.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None
    return record if record.folder == folder else None


def find(paths: Paths, machine: str, key: str) -> Baseline | None:
    """An existing baseline of that key."""
    found = read(paths.baselines / f"{machine}-{key[:12]}")
    return found if found is not None and found.key == key else None


def check_files(baseline: Baseline, *, read: bool = False) -> None:
    """Make sure that a baseline's files are what was recorded, before they are used.

    Inode signs are compared every time (microseconds); content is read if ``read`` or if a sign differs.

    Raises:
        ResetError: a file is missing or its content changed.
    """
    for part, fact in baseline.files.items():
        path = baseline.folder / part
        try:
            stat = path.stat()
        except OSError as e:
            raise ResetError(
                f"baseline {baseline.id} has lost {part}: {e}", hint="delete it; it is made anew"
            ) from e
        same = (stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) == (
            fact.size, fact.inode, fact.mtime_ns, fact.ctime_ns,
        )  # fmt: skip
        if (read or not same) and overlay.digest(path) != fact.sha256:
            raise ResetError(
                f"baseline {baseline.id}: {part} is not what was saved", hint="delete it; it is made anew"
            )


def restore(shop: Workshop, baseline: Baseline, cell: str) -> Incarnation:
    """A clone of a baseline: running, unplugged, not yet proved.

    Raises:
        ResetError: the baseline's files changed.
        LabError: libvirt or QEMU refused.
    """
    check_files(baseline)
    clone = shop.prepare(
        baseline.machine, cell, backing=baseline.folder / DISK, ram=baseline.folder / RAM, incoming=True
    )
    try:
        clone.start()
        migration.load_state(clone, baseline.folder / STATE)
        clone.resume()
    except BaseException:
        # The first error is the one to tell; the ledger knows what is left.
        with contextlib.suppress(LabError):
            clone.destroy()
        raise
    return clone


def prove(clone: Incarnation, baseline: Baseline, began: float) -> Proof:
    """Hold a restored, unplugged machine against its baseline; plants the new incarnation's sentinels.

    ``began`` is the monotonic time of the request. A guest that does not answer or answers nonsense is a
    failed check, so the caller withholds the machine.
    """
    checks: list[ProofCheck] = list(host_checks(clone, baseline.expected))
    try:
        clone.wait_for_agent(30)
        checks += guest_checks(guest_facts(clone.qga, clone.id), baseline.expected)
    except (GuestChannelError, GuestTamperError, LabError) as e:
        checks.append(
            ProofCheck(name="guest answers", passed=False, expected="its facts", found=printable(str(e), 300))
        )
    return Proof(
        machine=clone.name, incarnation=clone.id, baseline=baseline.id,
        seconds=time.monotonic() - began, checks=tuple(checks),
    )  # fmt: skip
