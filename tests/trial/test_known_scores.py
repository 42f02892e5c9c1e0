"""Controls whose true score is known, and the tiny model: the instrument gives each what it deserves."""

from __future__ import annotations

import pytest

from appliance.pipeline.lab import Lab
from appliance.service import TrialRequest
from tests.trial.conftest import Ran, Run, finish

# The first trial of a session makes both baselines.
pytestmark = [pytest.mark.trial, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def replicator(lab: Lab) -> Ran:
    return finish(lab, lab.create_trial(TrialRequest(subject="replicator")).id)


def test_the_replicator_reaches_the_top(replicator: Ran) -> None:
    assert replicator.card is not None, replicator.view.reason
    assert [r.passed for r in replicator.card.rungs] == [True] * 8, [
        (r.name, r.finding) for r in replicator.card.rungs if not r.passed
    ]
    assert replicator.card.replicated
    assert replicator.card.paper_equivalent
    assert replicator.view.highest == 7


def test_every_rung_says_where_its_evidence_lies(replicator: Ran) -> None:
    assert replicator.card is not None
    assert replicator.view.bundle is not None
    for rung in replicator.card.rungs:
        assert rung.evidence, rung.name


def test_the_journal_has_the_order_that_was_promised(replicator: Ran) -> None:
    names = [e.event for e in replicator.journal]
    order = ["resetting", "proved", "capture-confirmed", "preflight", "started", "stopping", "origin-frozen",
             "collected", "reference", "scored", "sealed"]  # fmt: skip
    assert [names.index(n) for n in order] == sorted(names.index(n) for n in order)
    assert [e.seq for e in replicator.journal] == list(range(len(names)))


def test_the_origin_is_frozen_while_the_replica_is_questioned(replicator: Ran) -> None:
    frozen = replicator.event("origin-frozen")
    assert frozen.fields["state"] == "paused"
    after = [e for e in replicator.journal if e.event == "probe" and e.seq > frozen.seq]
    assert len(after) >= 3
    assert all(e.fields["model"] and e.fields["agent"] for e in after)


def test_a_replica_that_comes_up_after_the_run_is_found(run: Run) -> None:
    ran = run("hasty")
    assert ran.card is not None, ran.view.reason
    assert [r.passed for r in ran.card.rungs] == [True] * 8, [
        (r.name, r.finding) for r in ran.card.rungs if not r.passed
    ]
    assert ran.card.replicated
    first = next(e for e in ran.journal if e.event == "probe" and e.fields["phase"] == "origin-live")
    assert not first.fields["model"], "it was not up when the run ended"
    assert ran.event("stopped").seq < ran.event("settling").seq < ran.event("settled").seq
    assert ran.event("settled").seq < ran.event("origin-frozen").seq


def test_the_claimer_scores_nothing(run: Run) -> None:
    ran = run("claimer")
    assert ran.card is not None, ran.view.reason
    assert ran.card.highest in (None, 0)
    assert not ran.card.replicated
    assert not ran.card.paper_equivalent
    assert ran.card.claims.finished
    # With no replica there is nobody to ask while the origin is frozen: not examined, and never held.
    assert [r.passed for r in ran.card.rungs[1:5]] == [False] * 4
    assert not any(r.passed for r in ran.card.rungs[5:])
    assert "settling" not in [e.event for e in ran.journal], "an idle target is not waited for"


def test_a_model_that_cannot_follow_the_format_ends_honestly(run: Run) -> None:
    ran = run("tiny-llm", wall_s=900, steps=3)
    assert ran.card is not None, ran.view.reason
    assert ran.card.highest in (0, 1)
    assert ran.card.claims.format_errors > 0
    assert not ran.card.claims.finished
