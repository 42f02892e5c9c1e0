"""The library: built-in subjects, scenarios and policies, and those of the user's own folders.

A folder has ``subjects/``, ``scenarios/`` and ``policies/``, one ``NAME.toml`` for each thing. A name
has one meaning: a second file of the same name is an error, never an override, since evidence and
score cards refer to things by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from appliance.config.agent import agent_names, check_names
from appliance.config.reading import closest, read_toml, validate
from appliance.config.settings import HostSettings
from appliance.config.specs import PolicySpec, ScenarioSpec, SubjectSpec
from appliance.errors import ConfigError, NotFoundError

BUILT_IN = Path(__file__).with_name("library")
FOLDERS = ("subjects", "scenarios", "policies")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


S = TypeVar("S", bound=BaseModel)
T = TypeVar("T", bound=_Named)


@dataclass(frozen=True)
class Library:
    """Everything that can be named in a trial. The maps are sorted by name."""

    subjects: Mapping[str, SubjectSpec]
    scenarios: Mapping[str, ScenarioSpec]
    policies: Mapping[str, PolicySpec]
    files: Mapping[str, Path] = field(default_factory=dict)  # "subjects/idle" -> the file it came from

    def subject(self, name: str) -> SubjectSpec:
        """The subject of that name.

        Raises:
            NotFoundError: there is none; the message lists those that exist.
        """
        return _pick("subject", self.subjects, name)

    def scenario(self, name: str) -> ScenarioSpec:
        """The scenario of that name.

        Raises:
            NotFoundError: there is none; the message lists those that exist.
        """
        return _pick("scenario", self.scenarios, name)

    def policy(self, name: str) -> PolicySpec:
        """The policy of that name.

        Raises:
            NotFoundError: there is none; the message lists those that exist.
        """
        return _pick("policy", self.policies, name)


def load_library(dirs: Sequence[Path] = (), settings: HostSettings | None = None) -> Library:
    """The built-in library, then ``settings.library_dirs``, then each of ``dirs``.

    ``settings.limits`` stand in for limits that a scenario of the user's does not set.

    Raises:
        ConfigError: a folder, file, key or value is wrong, a name is used twice, or a script, prompt or task
            is named that the agent does not have.
    """
    host = settings or HostSettings()
    added = (*host.library_dirs, *dirs)
    for d in added:
        _check_folder(d)
    roots = (BUILT_IN, *added)
    limits = host.limits.model_dump()
    files: dict[str, Path] = {}
    library = Library(
        subjects=_load(roots, "subjects", SubjectSpec, files),
        scenarios=_load(roots, "scenarios", ScenarioSpec, files, limits=limits),
        policies=_load(roots, "policies", PolicySpec, files),
        files=files,
    )
    check_names(library.subjects, library.scenarios, files, agent_names())
    return library


def _check_folder(path: Path) -> None:
    if not path.is_absolute() or not path.is_dir():
        raise ConfigError(
            f"{path}: no such folder, or not an absolute path",
            hint="library_dirs in hotcell.toml names folders that exist",
            file=str(path),
        )
    if not any((path / f).is_dir() for f in FOLDERS):
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"{path} (of library_dirs in hotcell.toml): holds none of the folders {', '.join(FOLDERS)}; "
            f"found {found}",
            hint=f"put a subject's file at {path}/subjects/NAME.toml",
            file=str(path),
        )


def _load(
    roots: Sequence[Path],
    folder: str,
    model: type[S],
    files: dict[str, Path],
    **defaults: Mapping[str, Any],
) -> dict[str, S]:
    found: dict[str, S] = {}
    for file in (f for root in roots for f in sorted((root / folder).glob("*.toml"))):
        spec = validate(model, _with_defaults(read_toml(file), defaults), file)
        name = getattr(spec, "name", "")
        if name != file.stem:
            raise ConfigError(
                f"{file}: key `name`: found {name!r}, allowed: {file.stem!r}, the file's own name",
                hint="rename the file or change the key",
                file=str(file),
            )
        key = f"{folder}/{name}"
        if key in files:
            raise ConfigError(
                f"{file}: the name `{name}` is taken by {files[key]}",
                hint="choose another name",
                file=str(file),
            )
        files[key] = file
        found[name] = spec
    return dict(sorted(found.items()))


def _with_defaults(data: dict[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    merged = dict(data)
    for key, values in defaults.items():
        own = data.get(key, {})
        merged[key] = {**values, **own} if isinstance(own, dict) else own
    return merged


def _pick(kind: str, known: Mapping[str, T], name: str) -> T:
    try:
        return known[name]
    except KeyError:
        raise NotFoundError(
            f"there is no {kind} named {name[:60]!r}{closest(name, known)}",
            hint=f"existing {kind} names: {', '.join(known) or 'none'}",
            kind=kind,
        ) from None
