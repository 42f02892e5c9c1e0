"""Every error as problem+json (RFC 9457). No stack trace and no guest text beyond what an error carries."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from appliance.errors import (
    Blame,
    ConfigError,
    ConflictError,
    HostError,
    HotcellError,
    NotFoundError,
    SealError,
    SubjectError,
    UserError,
)
from appliance.host.log import Log
from appliance.model import Frozen, printable

log = Log("hotcell.api")

MEDIA_TYPE = "application/problem+json"
_TEXT = 4000
_FIELDS = 16
_MISTAKES = 20
# The first class that matches decides.
_STATUS: tuple[tuple[type[HotcellError], int], ...] = (
    (NotFoundError, 404),
    (ConflictError, 409),
    (ConfigError, 422),
    (UserError, 400),
    (HostError, 503),
    (SealError, 503),
    (SubjectError, 502),
)


class Mistake(Frozen):
    """One part of a request that is wrong."""

    where: str = Field(description="Where in the request, such as `body.limits.steps`.")
    found: str = Field(description="What was there, shortened.")
    problem: str


class Problem(Frozen):
    """An error (RFC 9457)."""

    type: str = Field(description="`urn:hotcell:problem:` and the code.")
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    instance: str = Field(description="Path of the request.")
    code: str
    blame: Blame = Field(description="Who has to act: user, host, lab or subject.")
    hint: str = Field(description="What to do next; may be empty.")
    fields: dict[str, str] = Field(description="Facts of the case.")
    errors: tuple[Mistake, ...] = Field(description="For a request that does not fit its schema.")


def status_of(error: HotcellError) -> int:
    """HTTP status that fits an error's class."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def problem_response(
    status: int,
    code: str,
    detail: str,
    *,
    instance: str,
    blame: Blame = Blame.USER,
    hint: str = "",
    fields: dict[str, object] | None = None,
    errors: tuple[Mistake, ...] = (),
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """A problem+json response; all text is bounded."""
    body = Problem(
        type=f"urn:hotcell:problem:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=_clean(detail),
        instance=printable(instance),
        code=code,
        blame=blame,
        hint=_clean(hint),
        fields={k: printable(str(v), _TEXT) for k, v in list((fields or {}).items())[:_FIELDS]},
        errors=errors,
    )
    return JSONResponse(body.model_dump(mode="json"), status, headers, MEDIA_TYPE)


def _clean(text: str) -> str:
    """Keep line breaks, drop other control characters, bound the length."""
    return "\n".join(printable(line, _TEXT) for line in text[:_TEXT].split("\n"))


def install(app: FastAPI) -> None:
    """Answer every kind of failure with a problem."""
    app.add_exception_handler(HotcellError, _hotcell)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _hotcell(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HotcellError)
    status = status_of(error)
    if status >= 500:
        log.warning("request-failed", path=request.url.path, code=error.code, detail=error.message)
    return problem_response(
        status,
        error.code,
        error.message,
        instance=request.url.path,
        blame=error.blame,
        hint=error.hint,
        fields=error.fields,
    )


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    mistakes = tuple(
        Mistake(
            where=printable(".".join(str(part) for part in e["loc"])),
            found=printable(repr(e.get("input"))),
            problem=printable(str(e["msg"])),
        )
        for e in error.errors()[:_MISTAKES]
    )
    detail = "; ".join(f"{m.where}: {m.problem}" for m in mistakes[:3])
    return problem_response(
        422,
        "invalid-request",
        f"the request does not fit its schema: {detail}",
        instance=request.url.path,
        hint="compare the request with /v1/openapi.json",
        errors=mistakes,
    )


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {404: "no-such-path", 405: "method-not-allowed", 413: "too-large"}
    return problem_response(
        error.status_code,
        codes.get(error.status_code, "http"),
        str(error.detail),
        instance=request.url.path,
        blame=Blame.USER if error.status_code < 500 else Blame.LAB,
        hint="the paths are in /v1/openapi.json" if error.status_code in {404, 405} else "",
        headers=dict(error.headers) if error.headers else None,
    )


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # Starlette raises it again after this answer, and the server logs it with its traceback.
    return problem_response(
        500,
        "internal",
        f"an unexpected {type(error).__name__}; this is a fault of hotcell",
        instance=request.url.path,
        blame=Blame.LAB,
        hint="the server's log has the traceback: server.log in its home, or the terminal that it was started in",
    )
