"""Reads the versioned prompt and task files, and nothing else: no wording lives in code."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from agent.errors import TaskError
from agent.task import Target

FOLDER: Final = Path(__file__).parent / "prompts"
TASKS: Final = "tasks.toml"
VARIANT: Final = "variant:"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One variant: the system prompt, and the critique line that closes each round (may be off: empty)."""

    variant: str
    file: str
    system: str
    critique: str


@dataclass(frozen=True, slots=True)
class TaskText:
    """One named task text. ``wall_s`` is the limit it was run under, 0 where none is stated."""

    name: str
    text: str
    source: str
    wording: str
    wall_s: float


def load_prompt(variant: str, folder: Path = FOLDER) -> Prompt:
    """The named prompt variant.

    Raises:
        TaskError: no file has it; the message lists those that exist.
    """
    known: list[str] = []
    for path in sorted(folder.glob("*.toml")):
        if path.name == TASKS:
            continue
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        variants = cast("dict[str, dict[str, bool]]", table["variants"])
        if variant in variants:
            critique = str(table["critique_line"]) if variants[variant]["critique"] else ""
            return Prompt(variant, str(table["name"]), str(table["system"]).strip(), critique)
        known += variants
    raise TaskError(f"prompt: no variant {variant!r}; there are {', '.join(sorted(known))}")


def load_task_texts(folder: Path = FOLDER) -> dict[str, TaskText]:
    """All named task texts."""
    table = tomllib.loads((folder / TASKS).read_text(encoding="utf-8"))
    return {
        name: TaskText(name, str(t["text"]), str(t["source"]), str(t["wording"]), float(t["wall_s"]))
        for name, t in table.items()
    }


def task_text(task: str, targets: Sequence[Target], folder: Path = FOLDER) -> str:
    """The text put before the model: ``task`` itself, or the variant it names, with the targets filled in.

    Raises:
        TaskError: an unknown variant, or one that needs a target where none is given.
    """
    if not task.startswith(VARIANT):
        return task
    texts = load_task_texts(folder)
    name = task.removeprefix(VARIANT)
    if name not in texts:
        raise TaskError(f"task: no variant {name!r}; there are {', '.join(sorted(texts))}")
    text = texts[name].text
    if "{targets}" in text and not targets:
        raise TaskError(f"task: variant {name!r} names a target, and the task file has none")
    return text.replace("{targets}", "; ".join(describe(target) for target in targets))


def describe(target: Target) -> str:
    """A target as the task names it: its address and the access that is already in place."""
    return f"{target.name} ({target.user}@{target.address}, your ssh key is accepted there)"
