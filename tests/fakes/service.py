"""A laboratory in memory: the whole of ``LabService``, no machine, trials that play a script.

Give ``fail`` an exception under a method's name and that method raises it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from appliance import __version__
from appliance.errors import Blame, ConflictError, NotFoundError
from appliance.model import Accelerator, Firmware, Role, Stopped, TrialState
from appliance.service import (
    BaselineDetail,
    BaselineFile,
    BaselineKind,
    BaselineView,
    CellRequest,
    CellView,
    ExecView,
    ExportView,
    FootprintView,
    HealthView,
    ImageView,
    KillView,
    MachineView,
    ProbeView,
    ResetView,
    SealView,
    Stray,
    SweepView,
    TransferView,
    TrialPage,
    TrialRequest,
    TrialView,
)
from appliance.trial.records import JournalEntry, ProofCheck, ResetProof

DIGEST = "3f" * 32
REPLICATES: tuple[tuple[str, dict[str, object]], ...] = (
    ("queued", {}),
    ("resetting", {}),
    ("baseline-making", {"machine": "origin", "detail": "first use"}),
    ("baseline-made", {"machine": "origin", "seconds": 31.5}),
    ("proved", {"machine": "origin", "seconds": 0.8, "checks": 5}),
    ("capture-confirmed", {}),
    ("preflight", {"held": 9, "leaked": 0, "unverified": 0}),
    ("started", {}),
    ("step", {"step": 1, "kind": "action", "text": "scp \x1b[31m../../etc\x07 [bold]target-1[/bold]"}),
    ("a-new-event", {"colour": "blue"}),
    ("stopping", {"reason": "finished"}),
    ("probe", {"phase": "origin-live", "machine": "target-1", "model": True, "agent": True, "seconds": 2.0}),
    ("collected", {}),
    ("reference", {}),
    ("scored", {"highest": 7, "verdict": "replicated"}),
)


class FakeLab:
    """In-memory ``LabService``. ``step_s``: seconds between journal entries; ``void``: trials become void."""

    def __init__(self, root: Path, *, step_s: float = 0.0, void: bool = False) -> None:
        self.root = root
        self.step_s = step_s
        self.void = void
        self.fail: dict[str, Exception] = {}
        self.calls: list[tuple[object, ...]] = []
        self.closed = 0
        self._began = time.monotonic()
        self._accepting = True
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._trials: dict[str, TrialView] = {}
        self._requests: dict[str, tuple[TrialRequest, str]] = {}
        self._journals: dict[str, list[JournalEntry]] = {}
        self._threads: list[threading.Thread] = []
        self._cells = {"lab": CellView(id="lab", state="ready", trial=None, machines=("origin", "target-1"))}
        self._incarnation = 1
        self._baselines: list[BaselineView] = []

    # the laboratory

    def health(self) -> HealthView:
        self._enter("health")
        running = sum(t.state is TrialState.RUNNING for t in self._trials.values())
        return HealthView(
            ok=self._accepting,
            version=__version__,
            uptime_s=time.monotonic() - self._began,
            accelerator=Accelerator.TCG,
            seal=SealView(sealed=True, detail="a fake reaches nothing"),
            warden=True,
            accepting=self._accepting,
            trials_running=running,
            queue=0,
            footprint=FootprintView(rss=100_000_000, cpu_s=time.process_time()),
        )

    def host(self) -> dict[str, object]:
        self._enter("host")
        return {"cores": 2, "memory": 24 * 2**30, "accelerator": "tcg"}

    def images(self) -> list[ImageView]:
        self._enter("images")
        return [
            ImageView(recipe="subject-cpu", digest=DIGEST, size=1 << 30, created=1.0),
            ImageView(recipe="world", digest=None, size=0, created=None),
        ]

    def cells(self) -> list[CellView]:
        self._enter("cells")
        return list(self._cells.values())

    def machines(self) -> list[MachineView]:
        self._enter("machines")
        return [self._machine(c, m) for c in self._cells.values() for m in c.machines]

    def baselines(self) -> list[BaselineView]:
        self._enter("baselines")
        return list(self._baselines)

    def baseline(self, name: str) -> BaselineDetail:
        self._enter("baseline", name)
        return BaselineDetail(
            **self._baseline(name).model_dump(), folder=f"/b/{name}", memory="", memory_mib=512, vcpus=2,
            devices=(), firmware=Firmware.BIOS, accelerator=Accelerator.TCG, versions={"qemu": "7.2.0"},
            layers=("/b/disk.qcow2",),
            files=(BaselineFile(name="ram", sha256=DIGEST, size=1 << 29, used=1 << 20),),
            held_against={"boot id": "b0"}, needed_by=("c1 uses it",), problem="",
        )  # fmt: skip

    def delete_baseline(self, name: str) -> BaselineView:
        self._enter("delete_baseline", name)
        found = self._baseline(name)
        self._baselines.remove(found)
        return found

    def export_baseline(self, name: str, to: Path) -> ExportView:
        self._enter("export_baseline", name, to)
        found = self._baseline(name)
        time.sleep(self.step_s)
        return ExportView(name=name, folder=str(to), files=3, size=found.size, seconds=0.1)

    def import_baseline(self, folder: Path, name: str | None) -> BaselineView:
        self._enter("import_baseline", folder, name)
        time.sleep(self.step_s)
        return self._new_baseline("target-1", name or folder.name, "ram", "import")

    def transfers(self) -> list[TransferView]:
        self._enter("transfers")
        return [TransferView(verb="export", name="clean", done=1, total=4)]

    def _baseline(self, name: str) -> BaselineView:
        found = next((b for b in self._baselines if b.name == name), None)
        if found is None:
            raise NotFoundError(f"there is no baseline {name!r}", hint="there are: none")
        return found

    def snapshot(self, cell: str, machine: str, name: str, kind: BaselineKind | None) -> BaselineView:
        self._enter("snapshot", cell, machine, name, kind)
        self._known(cell, machine)
        return self._new_baseline(machine, name, kind or "ram", "request")

    def _new_baseline(self, machine: str, name: str, kind: str, by: str) -> BaselineView:
        if any(b.name == name for b in self._baselines):
            raise ConflictError(f"there is a baseline {name}", hint="choose another name")
        made = BaselineView(
            name=name,
            machine=machine,
            image="target-cpu",
            image_digest=DIGEST,
            created=1.0,
            size=1 << 20,
            seconds=0.1,
            kind=kind,
            created_by=by,
            parent="",
        )
        self._baselines.append(made)
        return made

    def reset(self, cell: str, machine: str, baseline: str | None = None) -> ResetView:
        self._enter("reset", cell, machine, baseline)
        self._known(cell, machine)
        if baseline is not None and self._baseline(baseline).machine != machine:
            raise ConflictError(f"{baseline} is not a baseline of {machine}", hint="choose another")
        self._incarnation += 1
        check = ProofCheck(name="ram-nonce", passed=True, expected="absent", found="absent")
        proof = ResetProof(
            machine=machine,
            incarnation=f"i{self._incarnation}",
            baseline="clean",
            seconds=0.5,
            checks=(check,),
        )
        return ResetView(
            cell=cell, machine=machine, proved=proof.proved, standby=True, direct_because="", withheld=(),
            answered_s=0.04, seconds=0.09, proof=proof,
        )  # fmt: skip

    def reset_cell(self, cell: str) -> list[ResetView]:
        self._enter("reset_cell", cell)
        return [self.reset(cell, m.name) for m in self.machines() if m.cell == cell]

    def exec(self, cell: str, machine: str, argv: list[str], timeout_s: float) -> ExecView:
        self._enter("exec", cell, machine, argv, timeout_s)
        self._known(cell, machine)
        if argv[0] == "sleep" and float(argv[1]) > timeout_s:
            return ExecView(rc=None, stdout="", stderr="", truncated=False, seconds=timeout_s, running_pid=7)
        rc = int(argv[1]) if argv[0] == "exit" else 0
        return ExecView(rc=rc, stdout=" ".join(argv) + "\n", stderr="", truncated=False, seconds=0.1)

    def probe(self, cell: str, machine: str) -> ProbeView:
        self._enter("probe", cell, machine)
        self._known(cell, machine)
        return ProbeView(machine=machine, model=False, agent=False, listeners=(22,), seconds=0.2, problem="")

    def open_cell(self, request: CellRequest) -> CellView:
        self._enter("open_cell", request)
        names = tuple(f"target-{i + 1}" for i in range(request.targets))
        cell = CellView(id=f"cell-{len(self._cells)}", state="ready", trial=None, machines=("origin", *names))
        self._cells[cell.id] = cell
        return cell

    def close_cell(self, cell: str) -> CellView:
        self._enter("close_cell", cell)
        self._known(cell)
        return self._cells.pop(cell).model_copy(update={"state": "closed", "machines": ()})

    # trials

    def create_trial(self, request: TrialRequest) -> TrialView:
        self._enter("create_trial", request)
        with self._changed:
            if request.key is not None and request.key in self._requests:
                known, trial_id = self._requests[request.key]
                if known != request:
                    raise ConflictError(
                        f"key {request.key} was used for another request", hint="use a new key"
                    )
                return self._trials[trial_id]
            if not self._accepting:
                raise ConflictError("the kill switch was thrown", hint="`hotcell rearm`")
            if request.subject == "nobody":
                raise NotFoundError("there is no subject nobody", hint="known: replicator, claimer")
            trial = self._new(request)
            self._trials[trial.id] = trial
            self._journals[trial.id] = []
            if request.key is not None:
                self._requests[request.key] = (request, trial.id)
        thread = threading.Thread(target=self._play, args=(trial.id,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return trial

    def trials(self, *, state: TrialState | None, subject: str | None, limit: int, offset: int) -> TrialPage:
        self._enter("trials", state, subject, limit, offset)
        found = [
            t
            for t in reversed(self._trials.values())
            if (state is None or t.state is state) and (subject is None or t.subject == subject)
        ]
        return TrialPage(
            items=tuple(found[offset : offset + limit]), total=len(found), limit=limit, offset=offset
        )

    def trial(self, trial_id: str) -> TrialView:
        self._enter("trial", trial_id)
        return self._get(trial_id)

    def follow(self, trial_id: str, from_seq: int) -> Iterator[JournalEntry | None]:
        self._enter("follow", trial_id, from_seq)
        at = from_seq
        while True:
            with self._changed:
                entries = self._journals[trial_id]
                if at >= len(entries) and not self._get(trial_id).state.ended:
                    self._changed.wait(0.2)
                fresh, ended = entries[at:], self._get(trial_id).state.ended
            yield from fresh
            at += len(fresh)
            if ended and not fresh:
                return
            if not fresh:
                yield None

    def abort(self, trial_id: str) -> TrialView:
        self._enter("abort", trial_id)
        with self._changed:
            if self._get(trial_id).state.ended:
                raise ConflictError(f"{trial_id} has ended", hint="nothing is left to abort")
            self._write(trial_id, "aborted", {})
            return self._set(trial_id, state=TrialState.ABORTED, ended=time.time(), reason="asked for")

    def score(self, trial_id: str) -> dict[str, object]:
        self._enter("score", trial_id)
        trial = self._get(trial_id)
        if trial.state is not TrialState.SEALED:
            raise ConflictError(f"{trial_id} has no scorecard", hint="wait until it is sealed")
        return scorecard(trial_id)

    def bundle(self, trial_id: str) -> Path:
        self._enter("bundle", trial_id)
        trial = self._get(trial_id)
        if trial.bundle is None:
            raise ConflictError(f"{trial_id} has no bundle", hint="wait until it is sealed")
        return Path(trial.bundle)

    # switches

    def kill(self, reason: str) -> KillView:
        self._enter("kill", reason)
        self._accepting = False
        return KillView(
            reason=reason, links_cut=2, machines_stopped=2, trials_ended=0, seconds=0.1, problems=()
        )

    def rearm(self) -> HealthView:
        self._accepting = True
        return self.health()

    def sweep(self, dry_run: bool) -> SweepView:
        self._enter("sweep", dry_run)
        stray = Stray(
            kind="tap", name="hct0", outcome="found" if dry_run else "removed", detail="cell is gone"
        )
        return SweepView(dry_run=dry_run, strays=(stray,))

    def close(self) -> None:
        self.closed += 1
        for trial in list(self._trials.values()):
            if not trial.state.ended:
                self.abort(trial.id)
        for thread in self._threads:
            thread.join(5)

    # inside

    def _enter(self, name: str, *args: object) -> None:
        self.calls.append((name, *args))
        if name in self.fail:
            raise self.fail[name]

    def _known(self, cell: str, machine: str | None = None) -> None:
        if cell not in self._cells:
            raise NotFoundError(f"there is no cell {cell}", hint="`hotcell cells` lists them")
        if machine is not None and machine not in self._cells[cell].machines:
            raise NotFoundError(f"cell {cell} has no machine {machine}", hint="`hotcell machines` lists them")

    def _machine(self, cell: CellView, name: str) -> MachineView:
        return MachineView(
            name=name,
            role=Role.ORIGIN if name == "origin" else Role.TARGET,
            cell=cell.id,
            state="running",
            image="subject-cpu",
            incarnation=f"i{self._incarnation}",
            pid=1,
            address="10.77.0.11",
            link_up=True,
        )

    def _get(self, trial_id: str) -> TrialView:
        if trial_id not in self._trials:
            raise NotFoundError(f"there is no trial {trial_id}", hint="`hotcell trials` lists them")
        return self._trials[trial_id]

    def _new(self, request: TrialRequest) -> TrialView:
        return TrialView(
            id=f"t20250102-030405-{next(self._numbers):06x}",
            state=TrialState.QUEUED,
            subject=request.subject,
            scenario=request.scenario,
            policy=request.policy,
            seed=request.seed,
            key=request.key,
            created=time.time(),
            started=None,
            ended=None,
            stopped=None,
            highest=None,
            verdict=None,
            blame=None,
            reason="",
            hint="",
            bundle=None,
        )

    def _set(self, trial_id: str, **changes: object) -> TrialView:
        self._trials[trial_id] = self._get(trial_id).model_copy(update=changes)
        self._changed.notify_all()
        return self._trials[trial_id]

    def _write(self, trial_id: str, event: str, fields: dict[str, object]) -> None:
        journal = self._journals[trial_id]
        journal.append(JournalEntry(seq=len(journal), at=time.time(), event=event, fields=fields))
        self._changed.notify_all()

    def _play(self, trial_id: str) -> None:
        for event, fields in REPLICATES:
            with self._changed:
                if self._get(trial_id).state.ended:
                    return
                self._write(trial_id, event, fields)
                if event == "started":
                    self._set(trial_id, state=TrialState.RUNNING, started=time.time())
            time.sleep(self.step_s)
        with self._changed:
            if self._get(trial_id).state.ended:
                return
            if self.void:
                self._write(trial_id, "void", {"blame": "lab", "reason": "the capture dropped packets"})
                self._set(
                    trial_id,
                    state=TrialState.VOID,
                    ended=time.time(),
                    blame=Blame.LAB,
                    reason="the capture dropped packets",
                    hint="run it again",
                )
                return
            folder = self._bundle(trial_id)
            self._write(trial_id, "sealed", {"bundle": str(folder)})
            self._set(
                trial_id,
                state=TrialState.SEALED,
                ended=time.time(),
                stopped=Stopped.FINISHED,
                highest=0 if self._get(trial_id).subject == "claimer" else 7,
                verdict="no attempt" if self._get(trial_id).subject == "claimer" else "replicated",
                bundle=str(folder),
            )

    def _bundle(self, trial_id: str) -> Path:
        folder = self.root / trial_id
        (folder / "disks").mkdir(parents=True)
        (folder / "journal.jsonl").write_text("{}\n")
        (folder / "disks" / "target-1.json").write_text("x" * 1000)
        return folder


def scorecard(trial_id: str) -> dict[str, object]:
    """A scorecard with all rungs held."""
    from appliance.score.card import RUNG_NAMES, Claims, Outcome, Rung, Scorecard

    rungs = tuple(
        Rung(number=i, name=name, passed=True, finding="seen", evidence=("probes.jsonl#1",))
        for i, name in enumerate(RUNG_NAMES)
    )
    card = Scorecard(
        trial=trial_id,
        verdict="replicated: all rungs hold on target-1",
        outcome=Outcome.REPLICATED,
        replicated=True,
        paper_equivalent=True,
        highest=7,
        target="target-1",
        rungs=rungs,
        targets=(),
        transfers=(),
        tolerance=0.001,
        stopped=Stopped.FINISHED,
        steps=4,
        wall_s=12.5,
        tampering=(),
        claims=Claims(finished=True, said="done", lines=9, commands=2, format_errors=0),
    )
    return card.model_dump(mode="json")
