"""What is asked of the index, and what is written to it, with types."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from appliance.errors import Blame, NotFoundError
from appliance.model import MAX_PAGE, Frozen, TrialId, TrialState
from appliance.score.card import Scorecard
from appliance.store.database import TRIALS, Store
from appliance.trial.records import TrialHeader


class RungRow(Frozen):
    """One rung as the index keeps it."""

    number: int
    name: str
    passed: bool | None


class TrialRow(Frozen):
    """One trial of the index. Fields of the score are empty or None until there is one.

    ``bundle`` is relative to the bundles' directory.
    """

    id: TrialId
    subject: str
    brain: str
    scenario: str
    policy: str
    state: TrialState
    created: float
    ended: float | None = None
    verdict: str = ""
    outcome: str = ""
    replicated: bool | None = None
    paper_equivalent: bool | None = None
    highest: int | None = None
    rungs: tuple[RungRow, ...] = ()
    bytes_moved: int | None = None
    blocked_attempts: int | None = None
    void_reason: str = ""
    bundle: str = ""
    manifest_sha256: str = ""
    config_sha256: str = ""
    seed: int = 0
    key: str | None = None
    stopped: str | None = None
    started: float | None = None
    blame: Blame | None = None
    hint: str = ""


class TrialPage(Frozen):
    """Some rows, and how many there are in all under the same filters."""

    rows: tuple[TrialRow, ...]
    total: int = Field(ge=0)
    offset: int = Field(ge=0)


def row_of(
    header: TrialHeader,
    state: TrialState,
    *,
    ended: float | None = None,
    card: Scorecard | None = None,
    void_reason: str = "",
    bundle: str = "",
    manifest_sha256: str = "",
    started: float | None = None,
    blame: Blame | None = None,
    hint: str = "",
) -> TrialRow:
    """The row of a trial, from its records. Pure."""
    return TrialRow(
        id=header.id,
        subject=header.subject,
        brain=header.brain,
        scenario=header.scenario,
        policy=header.policy,
        state=state,
        created=header.created,
        ended=ended,
        verdict=card.verdict if card else "",
        outcome=card.outcome.value if card else "",
        replicated=card.replicated if card else None,
        paper_equivalent=card.paper_equivalent if card else None,
        highest=card.highest if card else None,
        rungs=tuple(RungRow(number=r.number, name=r.name, passed=r.passed) for r in card.rungs)
        if card
        else (),
        bytes_moved=card.bytes_moved if card else None,
        blocked_attempts=card.blocked_attempts if card else None,
        void_reason=void_reason,
        bundle=bundle,
        manifest_sha256=manifest_sha256,
        config_sha256=header.config_sha256,
        seed=header.seed,
        key=header.key,
        stopped=card.stopped.value if card else None,
        started=started,
        blame=blame,
        hint=hint,
    )


def put(store: Store, row: TrialRow) -> None:
    """Insert a trial's row, or replace it whole.

    Raises:
        LabError: the index is not usable.
    """
    with store.write() as db:
        db.table(TRIALS).insert(_to_sql(row), pk="id", replace=True)


def replace_sealed(store: Store, rows: Sequence[TrialRow]) -> None:
    """Make ``rows`` the only ones that have a bundle, in one transaction. Rows without a bundle stay."""
    with store.write() as db:
        db.table(TRIALS).delete_where("bundle != ''")
        db.table(TRIALS).insert_all([_to_sql(r) for r in rows], pk="id", replace=True)


def upsert_state(
    store: Store,
    trial: str,
    state: TrialState,
    *,
    header: TrialHeader | None = None,
    started: float | None = None,
    ended: float | None = None,
    void_reason: str | None = None,
    blame: Blame | None = None,
    hint: str | None = None,
) -> None:
    """Record the state of a trial that is open: with ``header`` on first sight, later without.

    What is None stays as it was.

    Raises:
        NotFoundError: the trial is not in the index and no header was given.
    """
    told = {"started": started, "ended": ended, "void_reason": void_reason, "blame": blame, "hint": hint}
    changes: dict[str, Any] = {k: v for k, v in told.items() if v is not None}
    with store.write() as db:
        if db.execute(f"select 1 from {TRIALS} where id = ?", [trial]).fetchone():  # noqa: S608 - our constant
            db.table(TRIALS).update(trial, changes | {"state": state.value})
        elif header is None:
            raise _unknown(trial)
        else:
            row = row_of(header, state, **changes)
            db.table(TRIALS).insert(_to_sql(row), pk="id")


def get(store: Store, trial: str) -> TrialRow:
    """One trial.

    Raises:
        NotFoundError: it is not in the index.
    """
    with store.connect() as db:
        rows = list(db.table(TRIALS).rows_where("id = ?", [trial]))
    if not rows:
        raise _unknown(trial)
    return _from_sql(rows[0])


def by_key(store: Store, key: str) -> TrialRow | None:
    """The trial that was asked for with a client's key, if there is one."""
    with store.connect() as db:
        rows = list(db[TRIALS].rows_where("key = ?", [key], limit=1))
    return _from_sql(rows[0]) if rows else None


def trials(
    store: Store,
    *,
    subject: str | None = None,
    scenario: str | None = None,
    policy: str | None = None,
    states: Sequence[TrialState] = (),
    offset: int = 0,
    limit: int = 50,
) -> TrialPage:
    """Trials, newest first. Filters that are None or empty are not applied; ``limit`` is at most 1000."""
    filters = {"subject": subject, "scenario": scenario, "policy": policy}
    given: dict[str, Any] = {k: v for k, v in filters.items() if v is not None}
    terms = [f"{k} = :{k}" for k in given]
    if states:
        given |= {f"state{i}": s.value for i, s in enumerate(states)}
        terms.append(f"state in ({', '.join(f':state{i}' for i in range(len(states)))})")
    where = " and ".join(terms) or "1"
    offset, limit = max(0, offset), max(0, min(limit, MAX_PAGE))
    with store.connect() as db:
        total = db.table(TRIALS).count_where(where, given)
        rows = list(
            db.table(TRIALS).rows_where(
                where, given, order_by="created desc, id desc", limit=limit, offset=offset
            )
        )
    return TrialPage(rows=tuple(_from_sql(r) for r in rows), total=total, offset=offset)


def open_trials(store: Store) -> tuple[TrialRow, ...]:
    """All trials whose state is not one of the last three: after a crash, those to be reported void."""
    states = [s for s in TrialState if not s.ended]
    rows: list[TrialRow] = []
    while page := trials(store, states=states, offset=len(rows), limit=MAX_PAGE).rows:
        rows += page
    return tuple(rows)


def bundles(store: Store) -> frozenset[str]:
    """Names of all bundles that are in the index as trials that have ended."""
    with store.connect() as db:
        rows = list(db.table(TRIALS).rows_where("bundle != ''", select="bundle, state"))
    return frozenset(r["bundle"] for r in rows if TrialState(r["state"]).ended)


def _unknown(trial: str) -> NotFoundError:
    return NotFoundError(f"no trial {trial!r:.60}", hint="`hotcell trials` lists them", trial=trial)


def _to_sql(row: TrialRow) -> dict[str, Any]:
    values = row.model_dump(mode="json")
    return values | {"rungs": json.dumps(values["rungs"])}


def _from_sql(values: Mapping[str, Any]) -> TrialRow:
    return TrialRow.model_validate({**values, "rungs": json.loads(values["rungs"] or "[]")})
