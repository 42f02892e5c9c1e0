"""The HTTP client behind the verbs: this home's unix socket, or a URL. Problems become our errors again."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from appliance.errors import (
    Blame,
    ConfigError,
    HostError,
    HotcellError,
    LabError,
    PrerequisiteError,
    SubjectError,
    UserError,
)
from appliance.host.paths import Paths
from appliance.model import NAME_PATTERN, TRIAL_ID_PATTERN, printable
from appliance.service import TrialPage, TrialView
from appliance.trial.records import JournalEntry

T = TypeVar("T")
_BY_BLAME = {
    Blame.USER: UserError,
    Blame.HOST: HostError,
    Blame.LAB: LabError,
    Blame.SUBJECT: SubjectError,
}
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}")
# Guests under software emulation are slow: a cell may take minutes to open, and exec allows 600 s.
_TIMEOUT = httpx.Timeout(30.0, connect=5.0)
_SLOW = httpx.Timeout(1800.0, connect=5.0)
_RECONNECTS = 5
START_ONE = "start one with `hotcell serve` in another terminal, or name one with --server"
_AS_ITS_USER = "run as the server's user, usually root"
_MAX_LINE = 1 << 20
_MAX_PORT = 65_535
_NAMES = "a name is lower case letters, digits and hyphens, at most 40"
# One of these collections: what it is called, its form, and who knows the right ones.
_ITEMS = {
    "trials": ("a trial's id", TRIAL_ID_PATTERN, "`hotcell trials` lists them; `last` is the newest"),
    "cells": ("a cell's name", NAME_PATTERN, f"`hotcell cells` lists them; {_NAMES}"),
    "machines": ("a machine's name", NAME_PATTERN, f"`hotcell machines` lists them; {_NAMES}"),
    "baselines": ("a baseline's name", NAME_PATTERN, f"`hotcell baselines` lists them; {_NAMES}"),
}


class Event(NamedTuple):
    """One server-sent event; ``name`` is empty for a heartbeat."""

    name: str
    data: str


def at(*parts: str) -> str:
    """The path of a thing below ``/v1/``: a collection, the name of one of it, and so on, at last a verb. Pure.

    Every name that a user may have typed comes into a request through here: in a path as it stands, ``x#y``
    would mean ``x`` and ``../y`` something else altogether.

    Raises:
        ConfigError: a name is none, or is not the id of a trial where one belongs.
    """
    for collection, name in zip(parts[::2], parts[1::2], strict=False):
        what, form, hint = _ITEMS[collection]
        if not re.fullmatch(form, name):
            raise ConfigError(f"{printable(name, 80)!r} is not {what}", hint=hint)
    return "/".join(quote(part, safe="") for part in parts)


def known_errors() -> dict[str, type[HotcellError]]:
    """Every error class by its code."""
    found: dict[str, type[HotcellError]] = {}
    waiting: list[type[HotcellError]] = [HotcellError]
    while waiting:
        kind = waiting.pop()
        found[kind.code] = kind
        waiting += kind.__subclasses__()
    return found


def error_of(response: httpx.Response) -> HotcellError:
    """The error that a response describes."""
    try:
        problem: dict[str, Any] = response.json()
        blame = Blame(problem["blame"])
        code, detail, hint = str(problem["code"]), str(problem["detail"]), str(problem["hint"])
    except (ValueError, KeyError, TypeError):
        return LabError(f"the server answered {response.status_code} without a problem description")
    kind = known_errors().get(code)
    if kind is None or kind is HotcellError:
        kind = _BY_BLAME[blame]
    return kind(detail, hint=hint)


@contextmanager
def arriving(target: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets the name ``target`` only when the block ends well.

    Raises:
        ConfigError: a file of an earlier attempt is in the way.
    """
    part = target.with_name(target.name + ".part")
    try:
        f = part.open("xb")
    except FileExistsError as e:
        raise ConfigError(f"{part} is in the way", hint="remove it, or choose another --out") from e
    try:
        with f:
            yield f
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class Client:
    """Calls of the API. Every method may raise any :class:`HotcellError` that the server reports."""

    def __init__(self, http: httpx.Client, where: str, log: str) -> None:
        self.http = http
        self.where = where
        self.see_log = f"see the server's log: {log}"

    def get(self, shape: type[T], path: str, **params: Any) -> T:
        """GET ``/v1/PATH`` as ``shape``."""
        return self._parse(
            shape, self._send("GET", path, params={k: v for k, v in params.items() if v is not None})
        )

    def post(self, shape: type[T], path: str, body: BaseModel | dict[str, Any] | None = None) -> T:
        """POST to ``/v1/PATH``; the answer as ``shape``."""
        content = body.model_dump(mode="json") if isinstance(body, BaseModel) else body
        return self._parse(shape, self._send("POST", path, json=content, timeout=_SLOW))

    def delete(self, shape: type[T], path: str) -> T:
        """DELETE ``/v1/PATH``; the answer as ``shape``."""
        return self._parse(shape, self._send("DELETE", path, timeout=_SLOW))

    def trial_id(self, name: str) -> str:
        """``name``, or the newest trial's id for ``last``."""
        if name != "last":
            return name
        newest = self.get(TrialPage, "trials", limit=1).items
        if not newest:
            raise UserError("there are no trials yet", hint="run one: `hotcell run replicator`")
        return newest[0].id

    def follow(self, trial: str, from_seq: int = 0) -> Iterator[JournalEntry | TrialView | None]:
        """Journal entries as they come, None for a heartbeat, at last the trial. Reconnects if broken off."""
        following, broken = from_seq, 0
        while True:
            try:
                for event in self._events(trial, following):
                    broken = 0
                    if event.name == "end":
                        yield TrialView.model_validate_json(event.data)
                        return
                    if event.name == "error":
                        raise LabError(f"following {trial} failed: {json.loads(event.data)['detail']}")
                    entry = JournalEntry.model_validate_json(event.data) if event.name == "journal" else None
                    if entry is not None:
                        following = entry.seq + 1
                    yield entry
            except (httpx.TransportError, ValidationError) as e:
                cause: Exception | None = e
            else:
                cause = None
            broken += 1
            if broken > _RECONNECTS:
                raise LabError(
                    f"lost the server while following {trial}",
                    hint=f"{self.see_log}; then `hotcell show {trial}`",
                ) from cause
            time.sleep(0.2 * broken)

    def _events(self, trial: str, from_seq: int) -> Iterator[Event]:
        headers = {"Last-Event-ID": str(from_seq - 1)} if from_seq else {}
        with self.http.stream("GET", f"/v1/{at('trials', trial, 'events')}", headers=headers) as response:
            if response.status_code != 200:
                response.read()
                raise error_of(response)
            name, data = "", ""
            for line in response.iter_lines():
                if len(line) + len(data) > _MAX_LINE:
                    raise LabError("the server sent an oversized event")
                if not line:
                    if data:
                        yield Event(name, data)
                    name, data = "", ""
                elif line.startswith(":"):
                    yield Event("", "")
                elif line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    data += line[6:]

    def download(self, path: str, target: Path) -> None:
        """GET a file into ``target``, which appears only when complete."""
        try:
            with self.http.stream("GET", f"/v1/{path}", timeout=_SLOW) as response:
                if response.status_code != 200:
                    response.read()
                    raise error_of(response)
                with arriving(target) as f:
                    for chunk in response.iter_bytes():
                        f.write(chunk)
        except httpx.TransportError as e:
            raise LabError(f"the download broke off: {e}", hint=self.see_log) from e

    def _send(self, method: str, path: str, **rest: Any) -> httpx.Response:
        try:
            response = self.http.request(method, f"/v1/{path}", **rest)
        except httpx.TimeoutException as e:
            raise LabError(f"{self.where} did not answer in time", hint=self.see_log) from e
        except httpx.TransportError as e:
            raise PrerequisiteError(f"no server answers at {self.where}: {e}", hint=START_ONE) from e
        if response.is_success:
            return response
        raise error_of(response)

    def _parse(self, shape: type[T], response: httpx.Response) -> T:
        try:
            return TypeAdapter(shape).validate_json(response.content)
        except ValidationError as e:
            raise LabError(
                f"the server's answer does not fit: {e.errors()[0]['msg']}",
                hint="server and command line may differ in version; restart the server",
            ) from e


@contextmanager
def connect(paths: Paths, server: str | None = None, token_file: Path | None = None) -> Iterator[Client]:
    """A client of the server of ``paths``, or of the one at URL ``server``.

    Raises:
        PrerequisiteError: no server runs.
        ConfigError: there is no usable token, the home is another user's, or the URL is none.
    """
    if server is None:
        if not _exists(paths.api_socket):
            raise PrerequisiteError(f"no server runs for {paths.home}", hint=START_ONE)
        where = os.fspath(paths.api_socket)
        transport, base = httpx.HTTPTransport(uds=where), "http://localhost"
    else:
        if not _is_url(server):
            raise ConfigError(f"--server {server!r} is not a URL", hint="such as http://127.0.0.1:7077")
        where, transport, base = server, httpx.HTTPTransport(), server.rstrip("/")
    name_it = f"name a file that holds the token of {where} with --token-file"
    own = server is None and token_file is None
    token = _read_token(token_file or paths.token, unreadable=_AS_ITS_USER if own else name_it, wrong=name_it)
    headers = {"Authorization": f"Bearer {token}"}
    # trust_env off: a proxy of the environment must never see the token.
    with httpx.Client(
        transport=transport, base_url=base, headers=headers, timeout=_TIMEOUT, trust_env=False
    ) as http:
        yield Client(http, where, _log(paths, server))


def _log(paths: Paths, server: str | None) -> str:
    """Where a server writes its log, in words. Pure."""
    if server is not None:
        return f"server.log in the home of {server}, or the terminal that it was started in"
    return f"{paths.server_log}, or the terminal that it was started in"


def _is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return bool(re.fullmatch(r"https?://[^\s/]+/?", text) and url.host and (url.port or 0) <= _MAX_PORT)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as e:
        raise ConfigError(f"{path.parent} cannot be read: {e.strerror}", hint=_AS_ITS_USER) from e


def _read_token(path: Path, *, unreadable: str, wrong: str) -> str:
    try:
        token = path.read_text(errors="replace")[:200].strip()
    except OSError as e:
        raise ConfigError(f"cannot read the API token {path}: {e.strerror}", hint=unreadable) from e
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{path} does not hold an API token", hint=wrong)
    return token
