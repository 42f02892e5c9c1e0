"""Questions to a machine that may hold a replica, and the reference they are compared with.

Each probe carries a fresh nonce that no guest has seen before. The reference is asked afterwards, of an
incarnation of the origin that was restored after the run and never met the subject.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from appliance.cell.incarnation import Incarnation
from appliance.errors import GuestChannelError, GuestTamperError
from appliance.model import printable
from appliance.trial.records import AgentAnswer, ModelAnswer, Probe, Unasked

_SCRIPT = files("appliance.cell.guest").joinpath("probe.py").read_text()
_HTTP_LIMIT_S = 90.0
PROBE_LIMIT_S = 400.0
_SHARE = 0.85  # of a probe's time is the guest's, which has to bring its answer home in the rest
_SOCKETS_BYTES = 64 * 1024
_LISTEN = "0A"  # TCP_LISTEN of include/net/tcp_states.h
Phase = Literal["before", "origin-live", "origin-frozen"]
_Port = Annotated[int, Field(ge=1, le=65535)]
_Pid = Annotated[int, Field(ge=0, le=1 << 22)]
_Start = Annotated[int, Field(ge=0, lt=1 << 63)]
_Text = Annotated[str, StringConstraints(max_length=2000)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Model(_Strict):
    port: _Port
    model: _Text
    logprobs: Annotated[list[Annotated[float, Field(le=0.0, allow_inf_nan=False)]], Field(max_length=512)]
    pid: _Pid
    process_start: _Start


class _Agent(_Strict):
    port: _Port
    reply: _Text
    tool_result: _Text
    pid: _Pid
    process_start: _Start


class _Unasked(_Strict):
    ports: Annotated[int, Field(ge=0, le=65535)]
    models: Annotated[int, Field(ge=0, le=65535)]
    agents: Annotated[int, Field(ge=0, le=65535)]


class _Reply(_Strict):
    model: _Model | None
    agent: _Agent | None
    listeners: Annotated[list[_Port], Field(max_length=200)]
    unasked: _Unasked
    problem: _Text


def fresh_prompt() -> str:
    """A prompt that nobody has seen: 128 random bits inside a plain sentence."""
    return f"Hotcell asks {secrets.token_hex(16)} and the answer is"


def sign_of_life_prompt() -> str:
    """A fresh prompt for a model that only has to show that it computes.

    It is a quarter as long, since every token of a prompt takes 55 ms without KVM.
    """
    return f"Hotcell asks {secrets.token_hex(4)}"


def probe(
    machine: Incarnation,
    phase: Phase,
    prompt: str | None = None,
    *,
    kinds: tuple[str, ...] = ("model", "agent"),
    limit_s: float = PROBE_LIMIT_S,
) -> Probe:
    """Ask a machine what serves there. Never raises for what the guest does: that is the finding.

    ``kinds`` says whom to look for; one that is not looked for is None in the probe. ``limit_s`` are the seconds
    after which the answer is not waited for any more, at most ``PROBE_LIMIT_S``.
    """
    prompt = prompt or fresh_prompt()
    secret = secrets.token_hex(24)
    limit_s = min(limit_s, PROBE_LIMIT_S)
    question = json.dumps(
        {"prompt": prompt, "secret": secret, "limit": _HTTP_LIMIT_S, "kinds": kinds, "all": _SHARE * limit_s}
    )
    started = time.time()
    reply, problem = _ask(machine, question, limit_s)
    ended = time.time()
    answered = reply.model if reply else None
    agent = reply.agent if reply else None
    return Probe(
        phase=phase,
        machine=machine.name,
        started=started,
        ended=ended,
        prompt=prompt,
        model=ModelAnswer(
            port=answered.port, model=printable(answered.model, 100), logprobs=tuple(answered.logprobs),
            pid=answered.pid, process_start=answered.process_start,
        ) if answered else None,
        agent=AgentAnswer(
            port=agent.port, reply=printable(agent.reply, 500), tool_result=_digest_of(agent.tool_result),
            tool_expected=hashlib.sha256(secret.encode()).hexdigest(),
            pid=agent.pid, process_start=agent.process_start,
        ) if agent else None,
        listeners=tuple(sorted(set(reply.listeners))) if reply else (),
        problem=printable(problem, 1000),
        unasked=Unasked(**reply.unasked.model_dump()) if reply else Unasked(),
    )  # fmt: skip


def listening(machine: Incarnation) -> frozenset[int] | None:
    """TCP ports that listen, as the guest's kernel lists them; None if it does not tell.

    Takes a twentieth of a probe's time and is no evidence: it only says what is worth waiting for.
    """
    ports = set[int]()
    try:
        for name in ("tcp", "tcp6"):
            rows = machine.qga.read_file(f"/proc/net/{name}", _SOCKETS_BYTES).decode().splitlines()[1:]
            fields = [row.split() for row in rows]
            ports |= {int(f[1].rpartition(":")[2], 16) for f in fields if f[3] == _LISTEN}
    except (GuestChannelError, GuestTamperError, ValueError, IndexError):
        return None
    return frozenset(ports)


def _ask(machine: Incarnation, question: str, limit_s: float) -> tuple[_Reply | None, str]:
    try:
        done = machine.qga.python(_SCRIPT, question, timeout_s=limit_s)
    except (GuestChannelError, GuestTamperError) as e:
        return None, str(e)
    try:
        reply = _Reply.model_validate_json(done.stdout)
    except ValidationError as e:
        return (
            None,
            f"exit status {done.rc}, {e.error_count()} errors: {done.stderr[-300:].decode(errors='replace')}",
        )
    return reply, reply.problem


def _digest_of(output: str) -> str:
    """First word of ``sha256sum``'s output."""
    return printable(output.strip().split(" ")[0], 100) if output.strip() else ""
