"""The names that the agent knows: its scripts, prompt variants and task texts. Read as data, never imported.

A name that it does not know ends the agent at once, and the trial would count as the subject's doing. So a
library that uses one is refused before anything starts. Images carry the agent of the same project tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.config.reading import closest, read_toml
from appliance.config.specs import ScenarioSpec, SubjectSpec
from appliance.errors import ConfigError

AGENT = Path(__file__).resolve().parents[2] / "agent"
_TASKS = "tasks.toml"
_VARIANT = "variant:"


@dataclass(frozen=True)
class AgentNames:
    """What a subject or a scenario may name, each sorted."""

    brains: tuple[str, ...]  # "llm", "script:NAME"
    prompts: tuple[str, ...]
    tasks: tuple[str, ...]  # "variant:NAME"


def agent_names(folder: Path = AGENT) -> AgentNames:
    """The names that the agent in ``folder`` knows.

    Raises:
        ConfigError: the folder holds no agent, or a data file of its own is broken.
    """
    # As in agent/brains.py: ``common`` is what the scripts share, and "-" in a name is "_" in the file's.
    scripts = [p.stem for p in (folder / "scripts").glob("[a-z]*.py") if p.stem != "common"]
    prompts = folder / "prompts"
    variants = [v for p in prompts.glob("*.toml") if p.name != _TASKS for v in _table(p, "variants")]
    return AgentNames(
        brains=("llm", *sorted(f"script:{s.replace('_', '-')}" for s in scripts)),
        prompts=tuple(sorted(variants)),
        tasks=tuple(sorted(_VARIANT + t for t in read_toml(prompts / _TASKS))),
    )


def check_names(
    subjects: Mapping[str, SubjectSpec],
    scenarios: Mapping[str, ScenarioSpec],
    files: Mapping[str, Path],
    known: AgentNames,
) -> None:
    """Refuse a subject or scenario that names what the agent does not know. All faults are told at once.

    Raises:
        ConfigError: one line for each fault: file, key, found, allowed.
    """
    faults = [
        (files[f"subjects/{s.name}"], fault)
        for s in subjects.values()
        for fault in _unknown("brain", s.brain, known.brains)
    ]
    for scenario in scenarios.values():
        file = files[f"scenarios/{scenario.name}"]
        faults += [(file, fault) for fault in _unknown("prompt", scenario.prompt, known.prompts)]
        if scenario.task.startswith(_VARIANT):
            faults += [(file, fault) for fault in _unknown("task", scenario.task, known.tasks)]
    if faults:
        raise ConfigError(
            "\n".join(f"{file}: {fault}" for file, fault in faults),
            hint="use one of the names listed, or a text of your own as the task; docs/agent.md tells what each is",
            file=str(faults[0][0]),
            faults=len(faults),
        )


def _unknown(key: str, value: str, known: tuple[str, ...]) -> Iterator[str]:
    if value not in known:
        yield f"key `{key}`: found {value[:80]!r}{closest(value[:80], known)}, allowed: {', '.join(known)}"


def _table(file: Path, key: str) -> dict[str, Any]:
    found = read_toml(file).get(key)
    if not isinstance(found, dict):
        raise ConfigError(
            f"{file}: table `{key}` is missing", hint="restore the folder agent/", file=str(file)
        )
    return found
