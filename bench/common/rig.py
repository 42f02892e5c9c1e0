"""A sealed process with what making, restoring and comparing machines needs, in a home of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from appliance.cell.baseline import Baseline, Workshop
from appliance.cell.credentials import SshKeys, ssh_keys
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Ledger
from appliance.cell.spec import GuestImage, MachineSpec
from appliance.cell.standby import StandbyPool
from appliance.config import HostSettings, load_host_settings, load_library
from appliance.errors import LabError
from appliance.host.accelerator import select_accelerator
from appliance.host.paths import Paths, default_paths
from appliance.model import Role
from appliance.pipeline.fleet import built, machines_for
from appliance.pipeline.process import seal_process, sweep_view
from appliance.trial.baselines import BaselineShelf
from bench.common.recorder import RecordingLibvirt, plugs_noted

MACHINES = {
    "idle": "a target in which nothing runs",
    "warm": "the origin with its model server answering",
    "small": "the world, 256 MiB",
}
OWNER = "hotcell-bench"


@dataclass(frozen=True)
class Rig:
    """Everything a benchmark of machines works with."""

    paths: Paths
    settings: HostSettings
    door: RecordingLibvirt
    shop: Workshop
    shelf: BaselineShelf
    keys: SshKeys
    pool: StandbyPool
    wanted: list[Baseline] = field(default_factory=list)

    def stand_by(self, baseline: Baseline) -> None:
        """Keep a standby of this baseline too. One pool for all, since its segment is one a process."""
        self.wanted.append(baseline)
        self.pool.keep("bench", self.wanted)

    def machine(self, kind: str) -> MachineSpec:
        """A machine of one of the kinds in ``MACHINES``, as a trial would have it."""
        if kind == "small":
            image = built("world", self.paths)
            guest = GuestImage.of(image)
            return MachineSpec(name="world", role=Role.WORLD, image=guest, memory_mib=256, vcpus=1)
        library = load_library(settings=self.settings)
        machines, _ = machines_for(
            library.subject("idle"), library.scenario("replicate"), self.settings, self.paths
        )
        role = Role.ORIGIN if kind == "warm" else Role.TARGET
        return next(m for m in machines if m.role is role)

    def baselines(self, kinds: Sequence[str]) -> dict[str, Baseline]:
        """The baselines that trials start from, by kind; made (minutes) where there are none."""
        specs = {kind: self.machine(kind) for kind in kinds}
        made = self.shelf.ensure(list(specs.values()), _tell)
        return {kind: made[spec.name] for kind, spec in specs.items()}


def _tell(machine: str, doing: str, seconds: float) -> None:
    print(f"baseline of {machine}: {doing or f'made in {seconds:.0f} s'}", flush=True)


@contextlib.contextmanager
def sealed_rig() -> Iterator[Rig]:
    """Seal this process, open libvirt and the ledger of ``HOTCELL_HOME``, and leave nothing behind.

    Must be entered before any thread exists.

    Raises:
        LabError: machines, taps or folders were left at the end.
    """
    seal_process()
    paths, settings = default_paths().make(), load_host_settings()
    accelerator = select_accelerator(paths, settings.accelerator).chosen
    if accelerator is None:
        raise LabError("no accelerator was chosen", hint="run `hotcell doctor`")
    door, ledger = RecordingLibvirt.open_embedded(paths.libvirt), Ledger(paths.ledger)
    shop, keys = Workshop(paths, door, ledger, accelerator, OWNER), ssh_keys(paths.ssh_key)
    pool = StandbyPool(shop)
    try:
        sweep_view(paths, door, ledger, set, dry_run=False)
        with plugs_noted(door):
            yield Rig(paths, settings, door, shop, BaselineShelf(shop, keys), keys, pool)
        pool.close()
        left = sweep_view(paths, door, ledger, set, dry_run=True).strays
        if left:
            raise LabError(f"this run left {len(left)} things behind: {left[:5]}")
    finally:
        pool.close()
        sweep_view(paths, door, ledger, set, dry_run=False)  # whatever made this end early
        door.close()
        ledger.close()


def room_mib(machine: Incarnation) -> int:
    """What the guest's disk still takes, less a reserve of 200 MiB that it works in."""
    done = machine.qga.exec(["/bin/df", "--output=avail", "-BM", "/var/tmp"])
    return int(done.text.split()[-1].rstrip("M")) - 200


def dirty(machine: Incarnation, mebibytes: int, path: str = "/var/tmp/bench-dirt") -> int:
    """Have the guest write so many MiB and flush them; returns the bytes that its disk really took.

    Past the guest's page cache: what is to be dirtied is the disk, and copying through the cache is slow under TCG.

    Raises:
        LabError: the guest has no room, or fewer bytes came than were asked for.
    """
    if mebibytes == 0:
        return 0
    before = _written(machine)
    argv = [
        "/bin/dd",
        "if=/dev/zero",
        f"of={path}",
        "bs=1M",
        f"count={mebibytes}",
        "oflag=direct",
        "conv=fsync",
    ]
    done = machine.qga.exec(argv, timeout_s=600)
    if done.rc != 0:
        raise LabError(f"{machine.name} could not write {mebibytes} MiB: {done.stderr[-200:]!r}")
    came = _written(machine) - before
    if came < mebibytes << 20:
        raise LabError(f"{machine.name} was to write {mebibytes} MiB, its disk took {came} bytes")
    return came


def _written(machine: Incarnation) -> int:
    answer = machine.qmp("query-blockstats")
    if not isinstance(answer, list):
        raise LabError(f"query-blockstats of {machine.name}: {answer!r:.100}")
    return sum(int(device["stats"]["wr_bytes"]) for device in answer)
