"""The three tools, the strict reading of a call, and the box that performs it.

A call is one JSON object: ``EXECUTE_CMD`` (command, terminal 1-5, command_type), ``RECEIVE_MSG`` (terminal),
``FINISH`` (message). ``terminal`` defaults to 1 and ``command_type`` to ``one_time``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Literal, cast

from agent.errors import FormatError, shown
from agent.terminals import TERMINALS, Result, Terminals

CommandType = Literal["one_time", "long_running"]

MAX_COMMAND: Final = 8192  # characters
MAX_MESSAGE: Final = 4096  # characters
COMMAND_S: Final = 300.0  # seconds a one_time command may take, unless the task says otherwise
RECEIVE_S: Final = 30.0  # seconds RECEIVE_MSG waits for something new, unless the task says otherwise

_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "EXECUTE_CMD": ("command", "terminal", "command_type"),
    "RECEIVE_MSG": ("terminal",),
    "FINISH": ("message",),
}


@dataclass(frozen=True, slots=True)
class Execute:
    """Run a shell command in a terminal."""

    command: str
    terminal: int = 1
    command_type: CommandType = "one_time"


@dataclass(frozen=True, slots=True)
class Receive:
    """Read what a terminal wrote since it was last read."""

    terminal: int = 1


@dataclass(frozen=True, slots=True)
class Finish:
    """End the run with a message."""

    message: str


Action = Execute | Receive | Finish


def action_dict(action: Action) -> dict[str, object]:
    """The call as the JSON object that ``parse_action`` reads back to the same action."""
    if isinstance(action, Execute):
        return {
            "tool": "EXECUTE_CMD",
            "command": action.command,
            "terminal": action.terminal,
            "command_type": action.command_type,
        }
    if isinstance(action, Receive):
        return {"tool": "RECEIVE_MSG", "terminal": action.terminal}
    return {"tool": "FINISH", "message": action.message}


def action_json(action: Action) -> str:
    """The call on one line of JSON."""
    return json.dumps(action_dict(action), ensure_ascii=False)


def parse_action(value: object, where: str = "Action") -> Action:
    """The action that a decoded JSON value asks for.

    Raises:
        FormatError: not an object, unknown tool, missing or unknown key, wrong type or range.
    """
    if not isinstance(value, dict):
        raise FormatError(
            "not an object", where=where, found=shown(value), allowed="one JSON object with a tool"
        )
    call = cast("dict[str, object]", value)
    tool = call.get("tool")
    if not isinstance(tool, str) or tool not in _KEYS:
        raise FormatError(
            "no such tool", where=f"{where}.tool", found=shown(tool), allowed=", ".join(sorted(_KEYS))
        )
    for key in call:
        if key != "tool" and key not in _KEYS[tool]:
            allowed = ", ".join(("tool", *_KEYS[tool]))
            raise FormatError(f"unknown key of {tool}", where=where, found=shown(key), allowed=allowed)
    if tool == "FINISH":
        return Finish(_text(call, "message", MAX_MESSAGE, where))
    terminal = _terminal(call, where)
    if tool == "RECEIVE_MSG":
        return Receive(terminal)
    return Execute(_text(call, "command", MAX_COMMAND, where), terminal, _command_type(call, where))


def _text(call: dict[str, object], key: str, limit: int, where: str) -> str:
    """A required string that is not blank, has no NUL and can be encoded."""
    found = call.get(key)
    allowed = f"a string of 1 to {limit} characters"
    place = f"{where}.{key}"
    if not isinstance(found, str):
        raise FormatError("missing or not a string", where=place, found=shown(found), allowed=allowed)
    if not found.strip() or len(found) > limit:
        raise FormatError("wrong length", where=place, found=f"{len(found)} characters", allowed=allowed)
    if "\x00" in found or any("\ud800" <= c <= "\udfff" for c in found):
        raise FormatError(
            "holds NUL or half a surrogate pair", where=place, found=shown(found), allowed="plain text"
        )
    return found


def _terminal(call: dict[str, object], where: str) -> int:
    found = call.get("terminal", 1)
    if isinstance(found, bool) or not isinstance(found, int) or found not in TERMINALS:
        raise FormatError(
            "no such terminal",
            where=f"{where}.terminal",
            found=shown(found),
            allowed=f"a whole number from {TERMINALS[0]} to {TERMINALS[-1]}",
        )
    return found


def _command_type(call: dict[str, object], where: str) -> CommandType:
    found = call.get("command_type", "one_time")
    if found == "one_time":
        return "one_time"
    if found == "long_running":
        return "long_running"
    raise FormatError(
        "no such command_type",
        where=f"{where}.command_type",
        found=shown(found),
        allowed="one_time, long_running",
    )


class Toolbox:
    """Performs actions on one set of terminals. Times are seconds."""

    def __init__(
        self, terminals: Terminals, command_s: float = COMMAND_S, receive_s: float = RECEIVE_S
    ) -> None:
        self._terminals = terminals
        self._command_s = command_s
        self._receive_s = receive_s

    def run(self, action: Execute | Receive, within_s: float = float("inf")) -> Result:
        """Perform one action in at most ``within_s`` seconds; a failing command is a result, not an error."""
        if isinstance(action, Receive):
            return self._terminals.receive(action.terminal, min(self._receive_s, within_s))
        if action.command_type == "long_running":
            return self._terminals.launch(action.terminal, action.command)
        return self._terminals.execute(action.terminal, action.command, min(self._command_s, within_s))

    def close(self) -> None:
        """End every terminal and what runs in it."""
        self._terminals.close()
