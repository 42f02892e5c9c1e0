"""One trial through all stages on a host in memory: however it ends, there is a sealed bundle and a row."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from appliance.cell.cell import Cell
from appliance.errors import (
    Blame,
    CommandError,
    GuestTamperError,
    NotFoundError,
    ResetError,
    SealError,
)
from appliance.evidence import bundle, journal
from appliance.model import TrialState
from appliance.pipeline.conduct import Outcome, conduct, open_folder
from appliance.store import queries
from appliance.store.reindex import row_of_bundle
from appliance.trial import records
from appliance.trial.plan import Plan
from appliance.trial.runner import TrialRun
from appliance.trial.stop import StopFlag
from tests.fakes.bench import KEY, Workbench, workbench


@pytest.fixture
def w(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    with workbench(monkeypatch) as made:
        yield made


def run(w: Workbench, stop: StopFlag | None = None, plan: Plan | None = None) -> tuple[Plan, Outcome]:
    plan = plan or w.plan()
    folder = open_folder(w.bench, plan)
    cell = Cell(plan.id, w.host.shop)
    return plan, conduct(w.bench, plan, folder, cell, stop or StopFlag())


def check_bundle(w: Workbench, plan: Plan, state: TrialState) -> queries.TrialRow:
    """What holds however a trial ended."""
    path = w.host.paths.bundles / plan.id
    assert bundle.verify(path, KEY.public_key()).ok
    assert not (w.host.paths.open_trials / plan.id).exists()
    row = queries.get(w.bench.store, plan.id)
    assert row.state is state
    assert row.bundle == plan.id
    assert row.ended
    assert (path / records.SCORE).exists() is (state is TrialState.SEALED)
    assert journal.read(path / records.JOURNAL)[-1].event == state.value
    assert w.host.left == []
    return row


def test_a_trial_that_replicates_is_scored_and_sealed(w: Workbench) -> None:
    plan, outcome = run(w)
    assert (outcome.state, outcome.reason) == (TrialState.SEALED, "")
    row = check_bundle(w, plan, TrialState.SEALED)
    assert (row.blame, row.hint) == (None, "")
    assert plan.header.created < (row.started or 0) < (row.ended or 0)
    assert row_of_bundle(w.host.paths.bundles / plan.id, KEY.public_key()) == row, (
        "the bundle alone tells all"
    )
    passed = {r.number for r in row.rungs if r.passed}
    assert passed >= {0, 2, 3, 4}, outcome.card
    assert not row.replicated, "no packet was seen: a copy that nobody moved is not one"


def test_a_claim_alone_reaches_nothing(w: Workbench) -> None:
    """The agent says FINISH; nothing was moved and nothing answers."""
    w.replicates = False
    plan, outcome = run(w)
    assert outcome.state is TrialState.SEALED
    row = check_bundle(w, plan, TrialState.SEALED)
    assert row.highest == 0
    assert row.replicated is False


class Breaking:
    """A run that ends with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(_run: TrialRun) -> None:
            raise error

        monkeypatch.setattr(TrialRun, "run", fail)


@pytest.mark.parametrize(
    ("error", "blame"),
    [
        (SealError("leaked"), Blame.LAB),
        (ResetError("withheld"), Blame.LAB),
        (CommandError("qemu-img failed", hint="install it"), Blame.HOST),
        (GuestTamperError("not honest"), Blame.LAB),  # it never met the subject: our baseline is wrong
        (NotFoundError("no machine"), Blame.USER),
        (ZeroDivisionError("division"), Blame.LAB),
        (OSError(28, "No space left on device"), Blame.LAB),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else str(x),
)
def test_an_error_makes_the_trial_void_and_says_whose_it_is(
    w: Workbench, monkeypatch: pytest.MonkeyPatch, error: Exception, blame: Blame
) -> None:
    Breaking(monkeypatch, error)
    plan, outcome = run(w)
    assert (outcome.state, outcome.blame) == (TrialState.VOID, blame)
    row = check_bundle(w, plan, TrialState.VOID)
    assert row.void_reason == outcome.reason
    assert str(error.args[-1]) in outcome.reason
    assert row.highest is None
    assert (row.blame, row.hint, row.started) == (blame, outcome.hint, None)
    assert row_of_bundle(w.host.paths.bundles / plan.id, KEY.public_key()) == row, (
        "the bundle alone tells all"
    )


def test_a_request_to_stop_aborts_and_a_failure_voids(w: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    for failure, state in ((False, TrialState.ABORTED), (True, TrialState.VOID)):
        stop = StopFlag()
        stop.set("the reason", failure=failure)
        plan, outcome = run(w, stop)
        assert (outcome.state, outcome.reason) == (state, "the reason")
        check_bundle(w, plan, state)


@pytest.mark.parametrize(
    "error",
    [
        SealError("a twin failed, since the links were cut"),
        FileNotFoundError(2, "No such file", "/proc/1/ns"),
    ],
    ids=["told", "untold"],
)
def test_what_breaks_because_of_the_cut_is_an_abort(
    w: Workbench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stop = StopFlag()

    def cut(_run: TrialRun) -> None:
        stop.set("aborted on request")
        raise error

    monkeypatch.setattr(TrialRun, "run", cut)
    plan, outcome = run(w, stop)
    assert (outcome.state, outcome.reason) == (TrialState.ABORTED, "aborted on request")
    check_bundle(w, plan, TrialState.ABORTED)


def test_a_stop_that_came_with_the_end_of_the_run_is_not_scored(
    w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warden cut the cell while the server stood still: the dead machines are not the subject's doing."""
    stop, real = StopFlag(), TrialRun.run

    def late(trial: TrialRun) -> None:
        real(trial)
        stop.set("the warden has ended", failure=True)

    monkeypatch.setattr(TrialRun, "run", late)
    plan, outcome = run(w, stop)
    assert outcome.state is TrialState.VOID
    check_bundle(w, plan, TrialState.VOID)


@pytest.mark.parametrize("record", [records.CAPTURE, records.PROOFS, records.PREFLIGHT])
def test_evidence_that_cannot_be_read_back_is_void(
    w: Workbench, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    real = TrialRun.run

    def damaged(trial: TrialRun) -> None:
        real(trial)
        (next(w.host.paths.open_trials.iterdir()) / record).write_bytes(b"{")

    monkeypatch.setattr(TrialRun, "run", damaged)
    plan, outcome = run(w)
    assert (outcome.state, outcome.blame) == (TrialState.VOID, Blame.LAB)
    check_bundle(w, plan, TrialState.VOID)


def test_a_trial_that_cannot_be_sealed_is_void_and_kept(w: Workbench) -> None:
    plan = w.plan()
    (w.host.paths.bundles / plan.id).mkdir()
    _, outcome = run(w, plan=plan)
    assert outcome.state is TrialState.VOID
    assert "not sealed" in outcome.reason
    assert (w.host.paths.open_trials / plan.id / records.TRIAL).exists()
    row = queries.get(w.bench.store, plan.id)
    assert (row.state, row.bundle) == (TrialState.VOID, "")
    assert (row.blame, row.hint) == (Blame.LAB, "the next start tries again")


def test_a_journal_that_cannot_be_written_at_the_end_is_void(
    w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = w.plan()
    folder = open_folder(w.bench, plan)
    Breaking(monkeypatch, SealError("x"))
    folder.journal.close()
    outcome = conduct(w.bench, plan, folder, Cell(plan.id, w.host.shop), StopFlag())
    assert outcome.state is TrialState.VOID
    assert "not sealed" in outcome.reason


@pytest.mark.parametrize("jump", [3600.0, -90_000.0])
def test_a_clock_that_jumps_within_a_trial_makes_it_void(
    w: Workbench, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Stamps of the capture and of the probes would be held against each other across the jump."""
    plan, real = w.plan(), time.time

    def jumped() -> float:
        return real() + (jump if '"event": "started"' in journal_events(w, plan) else 0)

    monkeypatch.setattr(time, "time", jumped)
    _, outcome = run(w, plan=plan)
    assert (outcome.state, outcome.blame) == (TrialState.VOID, Blame.LAB)
    assert "clock jumped" in outcome.reason


def journal_events(w: Workbench, plan: Plan) -> str:
    path = w.host.paths.open_trials / plan.id / records.JOURNAL
    return path.read_text() if path.exists() else ""
