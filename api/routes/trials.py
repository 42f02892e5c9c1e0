"""Trials: create, list, follow, stop, score, take home."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Header, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from api import tarstream
from api.examples import EXAMPLES, SCORE_EXAMPLE, answer, body, problems
from api.routes import Following, Lab
from api.schemas import Seq, TrialParameter
from api.sse import EventStream
from appliance.errors import CapacityError
from appliance.model import MAX_PAGE, Frozen, Name, TrialState
from appliance.service import TrialPage, TrialRequest, TrialView
from appliance.trial.records import JournalEntry

router = APIRouter(tags=["trials"])


class TrialQuery(Frozen):
    """Which trials to list; an unknown parameter is an error."""

    state: TrialState | None = Field(default=None, description="Only trials in this state.")
    subject: Name | None = Field(default=None, description="Only trials of this subject.")
    limit: int = Field(default=50, ge=1, le=MAX_PAGE, description="At most this many.")
    offset: int = Field(default=0, ge=0, le=10_000_000, description="Skip this many.")


_EVENT = f"id: 4\nevent: journal\ndata: {JournalEntry(**EXAMPLES[JournalEntry]).model_dump_json()}\n\n"


@router.post("/trials", status_code=201, responses=answer(TrialView, 400, 404, 409, 503, status=201))
def create_trial(
    lab: Lab, response: Response, request: Annotated[TrialRequest, Body(openapi_examples=body(TrialRequest))]
) -> TrialView:
    """Queue a trial. With a `key`, repeating the same request returns the same trial."""
    made = lab.create_trial(request)
    response.headers["Location"] = f"/v1/trials/{made.id}"
    return made


@router.get("/trials", responses=answer(TrialPage))
def trials(lab: Lab, query: Annotated[TrialQuery, Query()]) -> TrialPage:
    """Trials, newest first."""
    return lab.trials(state=query.state, subject=query.subject, limit=query.limit, offset=query.offset)


@router.get("/trials/{trial}", responses=answer(TrialView, 404))
def trial(lab: Lab, trial: TrialParameter) -> TrialView:
    """One trial."""
    return lab.trial(trial)


@router.get(
    "/trials/{trial}/events",
    response_class=EventStream,
    responses={
        200: {
            "description": "Events `journal` (id: its number), at last `end` (the trial) or `error`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EVENT}},
        },
        **problems(404, 503),
    },
)
def follow(
    lab: Lab,
    following: Following,
    trial: TrialParameter,
    from_seq: Annotated[Seq, Query(description="First entry wanted.")] = 0,
    last_event_id: Annotated[Seq | None, Header(description="Last entry seen; wins over from_seq.")] = None,
) -> EventStream:
    """Follow a trial's journal as server-sent events, from the start or from where a reader broke off."""
    lab.trial(trial)
    if following.full:
        raise CapacityError("too many readers follow journals", hint="end some; each holds a thread")
    first = from_seq if last_event_id is None else last_event_id + 1
    entries = lab.follow(trial, first)
    return EventStream(following.stream(entries, lambda: lab.trial(trial)))


@router.post("/trials/{trial}/abort", responses=answer(TrialView, 404, 409))
def abort(lab: Lab, trial: TrialParameter) -> TrialView:
    """Stop a trial at any moment; its machines are reset and its evidence kept."""
    return lab.abort(trial)


@router.get("/trials/{trial}/score", responses=answer(SCORE_EXAMPLE, 404, 409))
def score(lab: Lab, trial: TrialParameter) -> dict[str, object]:
    """The scorecard: each rung with the evidence it rests on, claims apart."""
    return lab.score(trial)


@router.get(
    "/trials/{trial}/bundle",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A tar archive: regular files and directories, sorted, no dates.",
            "content": {
                "application/x-tar": {
                    "schema": {"type": "string", "format": "binary"},
                    "example": "(tar archive)",
                }
            },
        },
        **problems(404, 409),
    },
)
def bundle(lab: Lab, trial: TrialParameter) -> StreamingResponse:
    """The sealed evidence as one archive. Check it with `hotcell verify`."""
    members = tarstream.plan(lab.bundle(trial), trial)
    headers = {
        "Content-Length": str(tarstream.length(members)),
        "Content-Disposition": f'attachment; filename="{trial}.tar"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(tarstream.stream(members), media_type="application/x-tar", headers=headers)
