"""One trial through all stages: plan, baselines, run, score, seal, index.

Every trial ends as a sealed bundle, also a void or aborted one: its journal is evidence of what failed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.cell.baseline import Workshop
from appliance.cell.cell import Cell
from appliance.cell.isolation import SealFact
from appliance.cell.standby import StandbyPool
from appliance.errors import Blame, HotcellError, LabError
from appliance.evidence import bundle, journal
from appliance.evidence.folder import TrialFolder
from appliance.host.clock import SteadyClock
from appliance.host.paths import Paths
from appliance.model import TrialState
from appliance.pipeline.process import cell_facts
from appliance.score.card import Scorecard
from appliance.score.load import load, load_record
from appliance.score.scoring import score
from appliance.store import queries
from appliance.store.database import Store
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
        return cell_facts(cell, bench.known_links, bench.host_namespace)

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
    except Exception as e:  # noqa: BLE001 - a defect must not leave a trial without an end
        # What fails after a request to stop fails because of it: machines vanish under whoever looks at them.
        return _stopped(stop) if stop.requested else _void(e)


def _void(error: Exception) -> Outcome:
    if not isinstance(error, HotcellError):
        reason = f"{type(error).__name__}: {error}"
        return Outcome(TrialState.VOID, blame=Blame.LAB, reason=reason, hint="a defect of Hotcell")
    # A tampering guest in reset or preflight has not met the subject: it is our baseline that is wrong.
    blame = Blame.LAB if error.blame is Blame.SUBJECT else error.blame
    return Outcome(TrialState.VOID, blame=blame, reason=error.message, hint=error.hint)


def _stopped(stop: StopFlag) -> Outcome:
    if stop.failure:
        return Outcome(TrialState.VOID, blame=Blame.LAB, reason=stop.reason)
    return Outcome(TrialState.ABORTED, reason=stop.reason)


def _finish(bench: Bench, plan: Plan, folder: TrialFolder, outcome: Outcome) -> Outcome:
    """Close, seal and index; if that fails the trial is void whatever it found, until the next start mends it."""
    try:
        fields = (
            {"blame": outcome.blame, "reason": outcome.reason, "hint": outcome.hint} if outcome.reason else {}
        )
        folder.journal.write(outcome.state.value, bundle=plan.id, **fields)
        folder.close()
        outcome.bundle = seal_folder(bench, folder.folder, outcome)
    except (HotcellError, OSError) as e:
        outcome = _unfinished(bench, folder.folder, e)
        put_void(bench, plan.id, outcome.reason, outcome.hint)
    return outcome


def _unfinished(bench: Bench, folder: Path, error: HotcellError | OSError) -> Outcome:
    """What a trial is whose evidence was not sealed, or was and is not in the index."""
    final = bundle_of(bench, folder)
    if final is None:
        reason, hint = f"not sealed: {error}", "the next start tries again"
    else:
        reason = f"its bundle {final} is there and is not in the index: {error}"
        hint = "the next start indexes it as what it was sealed as, if it verifies"
    return Outcome(TrialState.VOID, blame=Blame.LAB, reason=reason, hint=hint, bundle=final)


def bundle_of(bench: Bench, folder: Path) -> Path | None:
    """The bundle that an open folder has become; None while it is still a folder."""
    final = bench.paths.bundles / folder.name
    return final if os.path.lexists(final) and not os.path.lexists(folder) else None


def put_void(bench: Bench, trial: str, reason: str, hint: str) -> None:
    """Index a trial as void by the laboratory's fault where there is no bundle that could be indexed.

    Raises:
        LabError: the index is not usable.
    """
    queries.upsert_state(
        bench.store, trial, TrialState.VOID, ended=time.time(), void_reason=reason, blame=Blame.LAB, hint=hint
    )


def seal_folder(bench: Bench, folder: Path, outcome: Outcome) -> Path:
    """Write how the trial ended, seal its folder under its final name, and index the bundle.

    Raises:
        EvidenceError: it could not be sealed, or the bundle cannot be read back.
        LabError: it is sealed and does not verify, or the index is not usable.
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
