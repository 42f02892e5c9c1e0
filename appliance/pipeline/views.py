"""From the stages' own values to the views that clients see. Pure."""

from __future__ import annotations

from appliance.build import Image
from appliance.cell.baseline import NVRAM, Baseline, DiskBaseline, RamBaseline
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.overlay import used_bytes
from appliance.cell.qga import GuestResult
from appliance.cell.renewal import Renewal
from appliance.host.paths import Paths
from appliance.model import Stopped
from appliance.service import (
    MAX_EXEC_OUTPUT,
    BaselineDetail,
    BaselineFile,
    BaselineView,
    CellView,
    ExecView,
    ImageView,
    MachineView,
    ResetView,
    TrialView,
)
from appliance.store.queries import TrialRow
from appliance.trial.records import ResetProof


def image_view(recipe: str, image: Image | None) -> ImageView:
    """A recipe and what is built of it."""
    if image is None:
        return ImageView(recipe=recipe, digest=None, size=0, created=None)
    size = sum(used_bytes(p) for p in image.folder.iterdir())
    return ImageView(recipe=recipe, digest=image.digest, size=size, created=image.record.built)


def cell_view(cell: Cell, trial: str | None, state: str) -> CellView:
    """An open cell."""
    return CellView(id=cell.id, state=state, trial=trial, machines=tuple(cell.machines))


def machine_view(machine: Incarnation) -> MachineView:
    """One machine, as it is now."""
    spec = machine.spec.machine
    return MachineView(
        name=spec.name, role=spec.role, cell=machine.cell, state=machine.state.value, image=spec.image.recipe,
        incarnation=machine.id, pid=machine.pid, address=spec.address, link_up=machine.plugged,
    )  # fmt: skip


def baseline_view(baseline: Baseline) -> BaselineView:
    """A saved state."""
    return BaselineView(
        name=baseline.id, machine=baseline.machine.name, image=baseline.machine.image.recipe,
        image_digest=baseline.machine.image.digest, created=baseline.created,
        size=sum(used_bytes(baseline.path(part)) for part in baseline.files), seconds=baseline.seconds,
        kind=baseline.kind, created_by=baseline.created_by, parent=baseline.parent,
    )  # fmt: skip


def baseline_detail(baseline: Baseline, needed_by: tuple[str, ...], problem: str) -> BaselineDetail:
    """Everything about a saved state."""
    memory = baseline.memory if isinstance(baseline, RamBaseline) else None
    return BaselineDetail(
        **baseline_view(baseline).model_dump(), folder=str(baseline.folder), memory=str(memory or ""),
        memory_mib=baseline.machine.memory_mib, vcpus=baseline.machine.vcpus, devices=baseline.machine.devices,
        firmware=baseline.machine.firmware, accelerator=baseline.accelerator, versions=baseline.versions,
        layers=tuple(str(p) for p in baseline.expected.chain),
        files=tuple(
            BaselineFile(name=n, sha256=f.sha256, size=f.size, used=used_bytes(baseline.path(n)))
            for n, f in baseline.files.items()
        ),
        held_against=_held_against(baseline), needed_by=needed_by, problem=problem,
    )  # fmt: skip


def _held_against(baseline: Baseline) -> dict[str, str]:
    """What a proof compares with; the nonce is told in part, since it is a secret until it is used."""
    expected = baseline.expected
    common = {"disk sentinel": "absent", "RAM sentinel": "absent", "backing chain": "as recorded"}
    if NVRAM in baseline.files:
        common["NVRAM"] = "a copy of the baseline's"
    if isinstance(baseline, DiskBaseline):
        return {**common, "boot id": f"another than {expected.boot_id}", "RAM nonce": "absent"}
    return {
        **common, "boot id": expected.boot_id, "RAM nonce": f"{expected.nonce[:8]}...",
        "processes": f"{len(baseline.expected.processes)} with their start times",
    }  # fmt: skip


def reset_view(cell: str, renewal: Renewal) -> ResetView:
    """A machine after reset."""
    return ResetView(
        cell=cell, machine=renewal.machine.name, proved=renewal.proof.proved,
        standby=not renewal.direct_because, direct_because=renewal.direct_because,
        withheld=tuple(p.failures for p in renewal.withheld),
        answered_s=renewal.answered_s, seconds=renewal.seconds, proof=ResetProof.of(renewal.proof),
    )  # fmt: skip


def exec_view(result: GuestResult, seconds: float) -> ExecView:
    """A guest's output, bounded."""
    out, err = result.stdout, result.stderr
    return ExecView(
        rc=result.rc,
        stdout=out[:MAX_EXEC_OUTPUT].decode(errors="replace"),
        stderr=err[:MAX_EXEC_OUTPUT].decode(errors="replace"),
        truncated=result.truncated or max(len(out), len(err)) > MAX_EXEC_OUTPUT,
        seconds=seconds,
    )


def still_running_view(pid: int, seconds: float) -> ExecView:
    """A command that outran its time. The guest's agent tells a program's output at its end only."""
    return ExecView(rc=None, stdout="", stderr="", truncated=False, seconds=seconds, running_pid=pid)


def trial_view(row: TrialRow, paths: Paths) -> TrialView:
    """A trial from the index."""
    return TrialView(
        id=row.id, state=row.state, subject=row.subject, scenario=row.scenario, policy=row.policy,
        seed=row.seed, key=row.key,
        created=row.created, started=row.started, ended=row.ended,
        stopped=Stopped(row.stopped) if row.stopped else None,
        highest=row.highest, verdict=row.verdict or None, blame=row.blame, reason=row.void_reason,
        hint=row.hint,
        bundle=str(paths.bundles / row.bundle) if row.bundle else None,
    )  # fmt: skip
