"""The task file: what the run is asked to do, by which brain, within which limits. Read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar, cast

from agent.errors import TaskError, shown

MAX_FILE: Final = 65536  # bytes
BRAIN: Final = re.compile(r"llm|script:[a-z][a-z0-9-]{0,39}")
NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")
ADDRESS: Final = re.compile(r"[0-9a-fA-F.:]{2,45}")
USER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """When the run ends: seconds, steps, and format retries a step."""

    wall_s: float
    steps: int
    format_retries: int


@dataclass(frozen=True, slots=True)
class Target:
    """A machine named in the task, with the user whose key is already in place."""

    name: str
    address: str
    user: str


@dataclass(frozen=True, slots=True)
class Task:
    """One task. ``task`` is the text as given, or ``variant:NAME`` of prompts/tasks.toml."""

    task: str
    brain: str
    prompt: str
    seed: int
    temperature: float
    max_tokens: int
    limits: Limits
    targets: tuple[Target, ...] = ()
    options: dict[str, object] = field(default_factory=dict)

    def number(self, option: str, default: float) -> float:
        """A positive number from ``options``.

        Raises:
            TaskError: present, but not a positive number.
        """
        value = self.options.get(option, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise TaskError(f"options.{option}: found {shown(value)}; allowed: a number above 0")
        return float(value)


def load_task(path: Path) -> Task:
    """Read and check a task file.

    Raises:
        TaskError: unreadable, too large, not JSON, or any key missing, unknown or wrong.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            raise TaskError(f"{path}: larger than {MAX_FILE} bytes")
        value: object = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise TaskError(f"{path}: {error}") from error
    try:
        return parse_task(value)
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from error


def parse_task(value: object) -> Task:
    """The task that a decoded JSON value describes; see :func:`load_task`."""
    table = _Table(value, "task file")
    limits = _Table(table.take("limits"), "limits")
    task = Task(
        task=table.get("task", _text(8192), "text of 1 to 8192 characters"),
        brain=table.get("brain", _match(BRAIN), "llm or script:NAME"),
        prompt=table.get("prompt", _match(NAME), "the name of a prompt variant"),
        seed=table.get("seed", _whole(0, 2**31 - 1), "a whole number from 0 to 2147483647"),
        temperature=table.get("temperature", _real(0.0, 2.0), "a number from 0 to 2"),
        max_tokens=table.get("max_tokens", _whole(1, 32768), "a whole number from 1 to 32768"),
        limits=Limits(
            wall_s=limits.get("wall_s", _real(0.001, 1e7), "seconds above 0"),
            steps=limits.get("steps", _whole(1, 100_000), "a whole number from 1 to 100000"),
            format_retries=limits.get("format_retries", _whole(0, 1000), "a whole number from 0 to 1000"),
        ),
        targets=table.get("targets", _targets, "a list of at most 16 targets"),
        options=table.get("options", _options, "an object"),
    )
    limits.done()
    table.done()
    return task


class _Table:
    """A JSON object whose keys must all be used, and only those."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise TaskError(f"{where}: found {shown(value)}; allowed: an object")
        self._left = dict(cast("dict[str, object]", value))
        self._where = where

    def take(self, key: str) -> object:
        if key not in self._left:
            raise TaskError(f"{self._where}: the key {key} is missing")
        return self._left.pop(key)

    def get(self, key: str, read: Callable[[object], T | None], allowed: str) -> T:
        value = self.take(key)
        result = read(value)
        if result is None:
            raise TaskError(f"{self._where}: {key}: found {shown(value)}; allowed: {allowed}")
        return result

    def done(self) -> None:
        if self._left:
            raise TaskError(f"{self._where}: unknown keys {shown(', '.join(sorted(self._left)))}")


def _text(limit: int) -> Callable[[object], str | None]:
    return lambda v: v if isinstance(v, str) and v.strip() and len(v) <= limit and "\x00" not in v else None


def _match(pattern: re.Pattern[str]) -> Callable[[object], str | None]:
    return lambda v: v if isinstance(v, str) and pattern.fullmatch(v) else None


def _whole(low: int, high: int) -> Callable[[object], int | None]:
    return lambda v: v if isinstance(v, int) and not isinstance(v, bool) and low <= v <= high else None


def _real(low: float, high: float) -> Callable[[object], float | None]:
    return lambda v: (
        float(v) if isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high else None
    )


def _options(value: object) -> dict[str, object] | None:
    return cast("dict[str, object]", value) if isinstance(value, dict) else None


def _targets(value: object) -> tuple[Target, ...] | None:
    if not isinstance(value, list) or len(value) > 16:
        return None
    result = []
    for number, item in enumerate(value):
        table = _Table(item, f"targets[{number}]")
        name = table.get("name", _match(NAME), "a machine name")
        address = table.get("address", _match(ADDRESS), "an IPv4 or IPv6 address")
        result.append(Target(name, address, table.get("user", _match(USER), "a user name")))
        table.done()
    return tuple(result)
