"""One trial through all stages: plan, baselines, run, score, seal, index. And what is made of one that broke.

Every trial ends as a sealed bundle, also a void or aborted one: its journal is evidence of what failed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.cell.baseline import Workshop
from appliance.cell.cell import Cell
from appliance.cell.isolation import SealFact, hypervisor_facts
from appliance.cell.standby import StandbyPool
from appliance.errors import Blame, HotcellError, LabError
from appliance.evidence import bundle, journal
from appliance.evidence.folder import TrialFolder
from appliance.host.clock import SteadyClock
from appliance.host.paths import Paths
from appliance.model import TrialState
from appliance.pipeline.process import seal_facts
from appliance.score.card import Scorecard
from appliance.score.load import load, load_record
from appliance.score.scoring import score
from appliance.store import queries
from appliance.store.database import Store
from appliance.store.reindex import row_of_bundle
from appliance.trial import records
from appliance.trial.baselines import BaselineShelf
from appliance.trial.plan import Plan
from appliance.trial.runner import Setting, TrialRun
from appliance.trial.stop import StopFlag, TrialAborted


@dataclass
class Outcome:
    """How a trial ended, for its view."""

    state: TrialState
    card: Scorecard | None = None
    blame: Blame | None = None
    reason: str = ""
    hint: str = ""
    started: float | None = None
    bundle: Path | None = None


@dataclass(frozen=True)
class Bench:
    """What conducting any trial needs."""

    paths: Paths
    shop: Workshop
    shelf: BaselineShelf
    store: Store
    key: Ed25519PrivateKey
    host_namespace: int
    known_links: Callable[[], tuple[set[str], set[str]]]
    standbys: StandbyPool


def open_folder(bench: Bench, plan: Plan) -> TrialFolder:
    """The trial's directory, header and first entry; from here on a crash leaves a trial to report."""
    folder = TrialFolder(bench.paths.open_trials / plan.id, bench.shop.ledger)
    folder.write(records.TRIAL, plan.header)
    folder.journal.write("queued", subject=plan.header.subject, scenario=plan.header.scenario)
    queries.upsert_state(bench.store, plan.id, TrialState.QUEUED, header=plan.header)
    return folder


def conduct(
    bench: Bench,
    plan: Plan,
    folder: TrialFolder,
    cell: Cell,
    stop: StopFlag,
    on_gone: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run one trial to its sealed bundle. Raises only what is a defect of ours.

    ``on_gone`` is called when its machines are gone, or could not be ended: before the trial is seen to have
    ended.
    """

    started: float | None = None

    def enter(state: TrialState) -> None:
        nonlocal started
        if state is TrialState.RUNNING:
            started = time.time()
        queries.upsert_state(bench.store, plan.id, state, started=started)

    try:
        outcome = _run_and_score(bench, plan, folder, cell, stop, enter)
    finally:
        bench.shelf.store.release(plan.id)
        bench.standbys.forget(plan.id)  # first: nothing more is made for it in the room that it gives back
        on_gone()
    outcome.started = started
    return _finish(bench, plan, folder, outcome)


def never_started(bench: Bench, plan: Plan, folder: TrialFolder, stop: StopFlag) -> Outcome:
    """The end of a trial that was stopped before its turn came."""
    return _finish(bench, plan, folder, _stopped(stop))


def _run_and_score(
    bench: Bench,
    plan: Plan,
    folder: TrialFolder,
    cell: Cell,
    stop: StopFlag,
    enter: Callable[[TrialState], None],
) -> Outcome:
    def report(machine: str, detail: str, seconds: float) -> None:
        stop.check()
        if detail:
            folder.journal.write("baseline-making", machine=machine, detail=detail)
        else:
            folder.journal.write("baseline-made", machine=machine, seconds=round(seconds, 1))

    def facts() -> list[SealFact]:
        found = seal_facts(bench.known_links)
        for machine in cell.machines.values():
            found += hypervisor_facts(machine, bench.host_namespace)
        return found

    try:
        stop.check()
        enter(TrialState.RESETTING)
        baselines = bench.shelf.ensure(plan.machines, report, stop.check)
        bench.shelf.store.hold(baselines.values(), plan.id)

        def run_enter(state: TrialState) -> None:
            enter(state)
            if state is TrialState.RUNNING:  # not before: making standbys would compete with the preflight
                bench.standbys.keep(plan.id, baselines.values())

        steady = SteadyClock()
        TrialRun(plan, Setting(cell, baselines, folder, stop, run_enter, facts)).run()
        stop.check()
        steady.require()
        enter(TrialState.SCORING)
        card = score(load(folder.folder))
        folder.write(records.SCORE, card)
        folder.journal.write("scored", highest=card.highest, verdict=card.verdict)
        return Outcome(TrialState.SEALED, card)
    except TrialAborted:
        return _stopped(stop)
    except HotcellError as e:
        if stop.requested:  # what failed is a consequence of the cut that the request made
            return _stopped(stop)
        # A tampering guest in reset or preflight has not met the subject: it is our baseline that is wrong.
        blame = Blame.LAB if e.blame is Blame.SUBJECT else e.blame
        return Outcome(TrialState.VOID, blame=blame, reason=e.message, hint=e.hint)
    except Exception as e:  # noqa: BLE001 - a defect must not leave a trial without an end
        return Outcome(
            TrialState.VOID, blame=Blame.LAB, reason=f"{type(e).__name__}: {e}", hint="a defect of Hotcell"
        )


def _stopped(stop: StopFlag) -> Outcome:
    if stop.failure:
        return Outcome(TrialState.VOID, blame=Blame.LAB, reason=stop.reason)
    return Outcome(TrialState.ABORTED, reason=stop.reason)


def _finish(bench: Bench, plan: Plan, folder: TrialFolder, outcome: Outcome) -> Outcome:
    """Close, seal and index; if the evidence cannot be sealed, the trial is void whatever it found."""
    try:
        fields = (
            {"blame": outcome.blame, "reason": outcome.reason, "hint": outcome.hint} if outcome.reason else {}
        )
        folder.journal.write(outcome.state.value, bundle=plan.id, **fields)
        folder.close()
        outcome.bundle = seal_folder(bench, folder.folder, outcome)
    except (HotcellError, OSError) as e:
        outcome = Outcome(
            TrialState.VOID, blame=Blame.LAB, reason=f"not sealed: {e}", hint="the next start tries again"
        )
        put_void(bench, plan.id, outcome.reason, outcome.hint)
    return outcome


def put_void(bench: Bench, trial: str, reason: str, hint: str) -> None:
    """Index a trial as void by the laboratory's fault where its evidence could not be sealed.

    Raises:
        LabError: the index is not usable.
    """
    queries.upsert_state(
        bench.store, trial, TrialState.VOID, ended=time.time(), void_reason=reason, blame=Blame.LAB, hint=hint
    )


def seal_folder(bench: Bench, folder: Path, outcome: Outcome) -> Path:
    """Write how the trial ended, seal its folder under its final name, and index the bundle.

    Raises:
        EvidenceError: it could not be sealed.
    """
    if outcome.state is not TrialState.SEALED:
        (folder / records.SCORE).unlink(missing_ok=True)
    closing = records.Closing(
        state=outcome.state, reason=outcome.reason, at=time.time(), blame=outcome.blame, hint=outcome.hint,
        started=outcome.started,
    )  # fmt: skip
    journal.write_record(folder / records.CLOSING, closing)
    final = bench.paths.bundles / folder.name
    bundle.seal(folder, final, bench.key)
    header = load_record(final / records.TRIAL, records.TrialHeader)
    report = bundle.verify(final, bench.key.public_key())
    if not report.ok:
        raise LabError(f"the bundle {final} does not verify right after sealing: {report.faults[0].detail}")
    queries.put(
        bench.store,
        queries.row_of(
            header, outcome.state, ended=closing.at, card=outcome.card, void_reason=outcome.reason,
            bundle=final.name, manifest_sha256=report.manifest_sha256,
            started=closing.started, blame=closing.blame, hint=closing.hint,
        ),
    )  # fmt: skip
    return final


_DIED = "the control process ended before the trial did"


def recover(bench: Bench) -> dict[str, str]:
    """Seal what an earlier process left open, as void, and bring the index up to date.

    Returns the names of the trials' folders, each with "" or why its evidence could not be sealed; it is kept
    as it is, that is tried again at the next start, and keeps no other trial from being sealed. A folder
    without a header never got as far as being a trial and is removed.
    """
    recovered: dict[str, str] = {}
    for folder in sorted(p for p in bench.paths.open_trials.iterdir() if p.is_dir()):
        try:
            if _never_a_trial(folder):
                shutil.rmtree(folder)
                continue
            recovered[folder.name] = ""
            load_record(folder / records.TRIAL, records.TrialHeader)  # before anything in it is touched
            journal.drop_parts(folder)
            with journal.Journal(folder / records.JOURNAL) as written:
                written.write(
                    TrialState.VOID.value, blame=Blame.LAB, reason=_DIED, hint="", bundle=folder.name
                )
            entries = journal.scan(folder / records.JOURNAL)
            started = next((e.at for e in entries if e.event == records.STARTED), None)
            seal_folder(
                bench, folder, Outcome(TrialState.VOID, blame=Blame.LAB, reason=_DIED, started=started)
            )
        except HotcellError as e:
            recovered[folder.name] = e.message
        except OSError as e:
            recovered[folder.name] = f"{folder}: {e.strerror or e}"
    for row in queries.open_trials(bench.store):
        _close_row(bench, row.id, recovered.setdefault(row.id, ""))
    return recovered


def _never_a_trial(folder: Path) -> bool:
    """Whether there is no header. One that cannot be read, for whatever reason, is evidence all the same.

    Raises:
        OSError: it cannot be told.
    """
    try:
        (folder / records.TRIAL).lstat()
    except FileNotFoundError:
        return True
    return False


def _close_row(bench: Bench, trial: str, problem: str) -> None:
    """A row that still says its trial runs: the crash came between sealing and indexing, or sealing failed."""
    try:
        queries.put(bench.store, row_of_bundle(bench.paths.bundles / trial, bench.key.public_key()))
    except (HotcellError, OSError):
        if problem:
            hint = f"it is kept in {bench.paths.open_trials / trial}, and the next start tries again"
            put_void(bench, trial, f"{_DIED}; not sealed: {problem}", hint)
        else:
            put_void(bench, trial, f"{_DIED}, and left no evidence", "")
