"""Opening a laboratory: accelerator, libvirt, ledger, reconciliation, warden, store."""

from __future__ import annotations

from appliance.cell.baseline import Workshop
from appliance.cell.baseline.places import memory_root
from appliance.cell.cell import Cell
from appliance.cell.credentials import ssh_keys
from appliance.cell.ledger import Kind, Ledger
from appliance.cell.libvirt_door import Libvirt
from appliance.cell.standby import StandbyPool
from appliance.cell.warden import Warden
from appliance.config import HostSettings, load_library
from appliance.errors import LabError
from appliance.evidence.keys import signing_key
from appliance.host.accelerator import select_accelerator
from appliance.host.log import Log
from appliance.host.paths import Paths
from appliance.pipeline.conduct import Bench
from appliance.pipeline.lab import Lab
from appliance.pipeline.process import require_sealed_process, sweep_view
from appliance.pipeline.recovery import recover, tell_recovered
from appliance.store.database import Store
from appliance.trial.baselines import BaselineShelf

log = Log("hotcell.lab")
OWNER = "hotcell"


def open_laboratory(paths: Paths, settings: HostSettings) -> Lab:
    """See :func:`appliance.pipeline.open_lab`."""
    host_namespace = require_sealed_process()
    library = load_library(settings=settings)
    accelerator = select_accelerator(paths, settings.accelerator)
    log.info("accelerator", line=accelerator.line)
    if accelerator.chosen is None:
        raise LabError("no accelerator was chosen")
    libvirt = Libvirt.open_embedded(paths.libvirt)
    ledger = Ledger(paths.ledger)
    swept = sweep_view(paths, libvirt, ledger, set, dry_run=False)
    for stray in swept.strays:
        log.warning("swept", kind=stray.kind, name=stray.name, outcome=stray.outcome, detail=stray.detail)
    if any(s.outcome == "failed" for s in swept.strays):
        raise LabError(
            "what an earlier process left cannot be removed", hint="`hotcell sweep` lists it with the reason"
        )
    memory = memory_root(paths, settings.baselines.memory_dir)
    shop = Workshop(paths, libvirt, ledger, accelerator.chosen, OWNER, memory)
    shelf = BaselineShelf(shop, ssh_keys(paths.ssh_key))
    for lost in shelf.store.drop_lost_memory():
        log.warning("dropped", folder=str(lost), reason="RAM of no baseline")
    standbys = StandbyPool(shop)
    cells: dict[str, Cell] = {}

    def known_links() -> tuple[set[str], set[str]]:
        """Bridges and taps that have an owner: open cells, templates in the making, standbys."""
        return links_of(ledger, set(cells) | shelf.cells_in_use() | standbys.in_use)

    store = Store(paths.database)
    store.hold()
    bench = Bench(
        paths, shop, shelf, store, signing_key(paths.signing_key), host_namespace, known_links,
        standbys,
    )  # fmt: skip
    tell_recovered(paths, recover(bench))
    lab = Lab(bench, settings, library, Warden(paths), cells)
    standbys.ask(lab.room_for_standby)
    return lab


def links_of(ledger: Ledger, owners: set[str]) -> tuple[set[str], set[str]]:
    """Bridges, and taps with anchors, that are written down for these cells. Read in one go: rows change hands."""
    things = [t for t in ledger.things() if t.owner in owners]
    bridges = {t.name for t in things if t.kind is Kind.BRIDGE}
    return bridges, {t.name for t in things if t.kind in (Kind.TAP, Kind.ANCHOR)}
