"""Where Debian packages come from: the host's own apt configuration, never a mirror of ours.

Both formats of sources.list(5) are read; entries that do not serve the wanted suite are left out. A host that
runs another Debian release lends its mirrors, with the suite's name exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from appliance.errors import ConfigError

# Releases of Debian whose mirrors also carry the suite we want (deb822 and one-line names alike).
_RELEASES = frozenset(
    {"bullseye", "bookworm", "trixie", "forky", "sid", "stable", "testing", "unstable", "oldstable"}
)
_POCKETS = ("", "-updates", "-security")
_ONE_LINE = re.compile(
    r"^deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<parts>.+)$"
)


@dataclass(frozen=True)
class Source:
    """One archive: a deb822 stanza, or one line."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""

    def stanza(self) -> str:
        """The deb822 text of it."""
        lines = [
            "Types: deb",
            f"URIs: {' '.join(self.uris)}",
            f"Suites: {' '.join(self.suites)}",
            f"Components: {' '.join(self.components)}",
        ]
        if self.signed_by:
            lines.append(f"Signed-By: {self.signed_by}")
        return "\n".join(lines) + "\n"


def _one_line(text: str) -> Iterator[Source]:
    for raw in text.splitlines():
        found = _ONE_LINE.match(raw.split("#", 1)[0].strip())
        if found is None:
            continue
        options = dict(o.split("=", 1) for o in (found["options"] or "").split() if "=" in o)
        yield Source(
            (found["uri"],), (found["suite"],), tuple(found["parts"].split()), options.get("signed-by", "")
        )


def _deb822(text: str) -> Iterator[Source]:
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and key:
                fields[key] += "\n" + line
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        yield Source(
            tuple(fields.get("uris", "").split()),
            tuple(fields.get("suites", "").split()),
            tuple(fields.get("components", "").split()),
            fields.get("signed-by", ""),
        )


def parse(name: str, text: str) -> tuple[Source, ...]:
    """All binary archives of one file; the format follows from the file's name."""
    return tuple(_deb822(text) if name.endswith(".sources") else _one_line(text))


def _release(suite: str) -> str:
    return suite.split("-", 1)[0].split("/", 1)[0]


def select(sources: Iterable[Source], suite: str) -> tuple[Source, ...]:
    """The archives that serve ``suite`` (with its updates and security pockets), main component only.

    If none does, the mirrors of another Debian release are used with the suite's name exchanged.

    Raises:
        ConfigError: the host has no Debian archive at all.
    """
    usable = [s for s in sources if s.uris and "main" in s.components]
    exact = _named(usable, {suite})
    if exact:
        return exact
    for release in sorted({_release(x) for s in usable for x in s.suites} & _RELEASES):
        lent = _named(usable, {release})
        if lent:
            return tuple(
                replace(s, suites=tuple(suite + x[len(release) :] for x in s.suites), signed_by="")
                for s in lent
            )
    raise ConfigError(
        f"the host's apt configuration has no archive that serves Debian {suite}",
        hint="add a Debian source to /etc/apt/sources.list.d, or set `apt_sources` in the build configuration",
    )


def _named(sources: Iterable[Source], releases: set[str]) -> tuple[Source, ...]:
    wanted = {r + p for r in releases for p in _POCKETS}
    kept = []
    for s in sources:
        suites = tuple(x for x in s.suites if x in wanted)
        if suites:
            kept.append(replace(s, suites=suites, components=("main",)))
    return tuple(kept)


def host_sources(etc_apt: Path = Path("/etc/apt")) -> tuple[Source, ...]:
    """All archives of this host, in the order apt reads them."""
    files = [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*"))]
    found: list[Source] = []
    for file in files:
        if file.is_file() and file.suffix in {".list", ".sources"}:
            found.extend(parse(file.name, file.read_text(encoding="utf-8", errors="replace")))
    return tuple(found)
