"""From a TOML file to a frozen model, or to an error that a newcomer can act on.

Every message names the file, the dotted key, what was found there and what is allowed. Pydantic's own
text is not shown: it speaks of "inputs" and "unions", not of files and keys.
"""

from __future__ import annotations

import difflib
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from appliance.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
MAX_BYTES = 1 << 20  # the largest built-in file has under 1 KiB; more is a mistake, not a setting


def closest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean `x`?)`` for a likely typing error, else nothing."""
    match = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f" (did you mean `{match[0]}`?)" if match else ""


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file of at most 1 MiB.

    Raises:
        ConfigError: it is missing, unreadable, too large, not UTF-8 or not TOML.
    """
    try:
        with path.open("rb") as f:
            raw = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise ConfigError(
            f"{path}: cannot be read: {e.strerror}", hint="check the path and its permissions", file=str(path)
        ) from e
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than 1 MiB", hint="is this the right file?", file=str(path))
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"{path}: byte {e.start} is not UTF-8", hint="save the file as UTF-8", file=str(path)
        ) from e
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(
            f"{path}: not valid TOML: {e}", hint='texts need quotes: key = "value"', file=str(path)
        ) from e


def validate(model: type[M], data: Mapping[str, Any], path: Path) -> M:
    """Make ``model`` of a parsed file. All faults of the file are reported at once.

    Raises:
        ConfigError: one line for each fault: file, key, found, allowed.
    """
    try:
        return model.model_validate(data)
    except ValidationError as e:
        faults = [_fault(model, d) for d in e.errors(include_url=False)]
    raise ConfigError(
        "\n".join(f"{path}: {f}" for f in faults),
        hint="docs/configuration.md lists every key with its meaning and default",
        file=str(path),
        faults=len(faults),
    )


def _fault(model: type[BaseModel], detail: ErrorDetails) -> str:
    loc = [str(p) for p in detail["loc"]]
    key, kind = ".".join(loc) or "(whole file)", detail["type"]
    if kind == "extra_forbidden":
        known = _keys_at(model, loc[:-1])
        return f"unknown key `{key}`{closest(loc[-1], known)}; allowed here: {', '.join(sorted(known))}"
    if kind == "missing":
        return f"key `{key}` is missing; it is required"
    allowed = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    pattern = detail.get("ctx", {}).get("pattern")
    if pattern:
        allowed = f"text of the form {pattern}"
    return f"key `{key}`: found {reprlib.repr(detail['input'])}, allowed: {allowed}"


def _keys_at(model: type[BaseModel], loc: list[str]) -> set[str]:
    """Names of the keys allowed in the table at ``loc``."""
    here: Any = model
    for part in loc:
        field = here.model_fields.get(part)
        here = field.annotation if field else None
        if not (isinstance(here, type) and issubclass(here, BaseModel)):
            return set()
    return set(here.model_fields)
