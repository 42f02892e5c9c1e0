"""The five-part reply, read strictly: Explanation, Gaps, Findings, Plan (three steps ahead), Action.

The five names and their order are those of arXiv 2412.12140, section 2.2. The exact spelling below is ours,
since the paper publishes none::

    Explanation: text, any number of lines
    Gaps: text
    Findings: text
    Plan:
    1. text
    2. text
    3. text
    Action: one JSON object

There is no repair and no guessing: a lenient reader would credit a model with what it did not say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from agent.errors import FormatError, shown
from agent.tools import Action, action_json, parse_action

MAX_REPLY: Final = 16384  # characters
PARTS: Final = ("Explanation", "Gaps", "Findings", "Plan", "Action")
PLAN_STEPS: Final = 3


@dataclass(frozen=True, slots=True)
class Thought:
    """One parsed reply."""

    explanation: str
    gaps: str
    findings: str
    plan: tuple[str, str, str]
    action: Action


def render(thought: Thought) -> str:
    """The reply text that ``parse_reply`` reads back to the same thought."""
    plan = "\n".join(f"{n}. {step}" for n, step in enumerate(thought.plan, start=1))
    return (
        f"Explanation: {thought.explanation}\nGaps: {thought.gaps}\nFindings: {thought.findings}\n"
        f"Plan:\n{plan}\nAction: {action_json(thought.action)}"
    )


def parse_reply(text: str) -> Thought:
    """Read one reply.

    Raises:
        FormatError: for every deviation, and nothing else for any string at all.
    """
    if len(text) > MAX_REPLY:
        raise FormatError(
            "too long", where="reply", found=f"{len(text)} characters", allowed=f"at most {MAX_REPLY}"
        )
    parts = _split(text.replace("\r\n", "\n").strip().split("\n"))
    return Thought(
        explanation=_prose(parts, "Explanation"),
        gaps=_prose(parts, "Gaps"),
        findings=_prose(parts, "Findings"),
        plan=_plan(parts["Plan"]),
        action=_action(parts["Action"]),
    )


def _split(lines: list[str]) -> dict[str, str]:
    """Each part's text, given that all five stand at line starts, once each and in order."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        part = next((p for p in PARTS if line.startswith(p + ":")), None)
        if part is not None:
            expected = PARTS[len(found)] if len(found) < len(PARTS) else None
            if part != expected:
                allowed = f"{expected}:" if expected else "nothing after Action"
                raise FormatError(
                    "part out of order", where=f"line {number}", found=shown(line), allowed=allowed
                )
            current = found.setdefault(part, [line[len(part) + 1 :]])
        elif current is None:
            raise FormatError(
                "text before the first part",
                where=f"line {number}",
                found=shown(line),
                allowed="Explanation:",
            )
        else:
            current.append(line)
    if len(found) < len(PARTS):
        missing = ", ".join(PARTS[len(found) :])
        raise FormatError("parts missing", where="reply", found=f"no {missing}", allowed=", ".join(PARTS))
    return {part: "\n".join(body).strip() for part, body in found.items()}


def _prose(parts: dict[str, str], name: str) -> str:
    if not parts[name]:
        raise FormatError("empty part", where=name, found="nothing", allowed="some text")
    return parts[name]


def _plan(body: str) -> tuple[str, str, str]:
    """The three steps: one a line, numbered 1. 2. 3., each with text."""
    allowed = "three lines, '1. text', '2. text', '3. text'"
    lines = [line.strip() for line in body.split("\n") if line.strip()]
    if len(lines) != PLAN_STEPS:
        raise FormatError(
            "not three forward steps", where="Plan", found=f"{len(lines)} lines", allowed=allowed
        )
    steps = []
    for number, line in enumerate(lines, start=1):
        head = f"{number}. "
        if not line.startswith(head) or not line[len(head) :].strip():
            raise FormatError(
                "step not numbered or empty", where=f"Plan, step {number}", found=shown(line), allowed=allowed
            )
        steps.append(line[len(head) :].strip())
    return steps[0], steps[1], steps[2]


def _action(body: str) -> Action:
    try:
        value: object = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and over-long integers
        raise FormatError(
            "not one JSON object",
            where="Action",
            found=shown(body),
            allowed=f"one JSON object ({error})"[:200],
        ) from error
    return parse_action(value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
