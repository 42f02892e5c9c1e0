"""The documentation says what is there: every key, verb, target and folder, and no dead link."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from appliance.cli.app import app
from appliance.config import HostSettings, PolicySpec, ScenarioSpec, SubjectSpec, load_library

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()
COMMANDS = (ROOT / "docs/command-line.md").read_text()


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a settings model, with their defaults."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field.default


def shown(default: object) -> str:
    """A default as the documentation writes it."""
    if default is None:
        return "unset"
    if default == ():
        return "`[]`"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"


@pytest.mark.parametrize(("key", "default"), list(keys(HostSettings)))
def test_every_setting_is_documented_with_its_default(key: str, default: object) -> None:
    row = re.search(rf"^\| `{re.escape(key)}` \| (.+?) \| (.+) \|$", CONFIGURATION, re.MULTILINE)
    assert row, f"docs/configuration.md has no row for {key}"
    assert row.group(1) == shown(default)


def test_no_setting_is_documented_that_does_not_exist() -> None:
    settings = CONFIGURATION.split("## Environment")[0]
    documented = set(re.findall(r"^\| `([a-z_.0-9]+)` \|", settings, re.MULTILINE))
    assert documented == {k for k, _ in keys(HostSettings)}


@pytest.mark.parametrize("model", [SubjectSpec, ScenarioSpec, PolicySpec])
def test_every_key_of_the_library_is_documented(model: type[BaseModel]) -> None:
    library = CONFIGURATION.split("## Library")[1]
    assert [k for k in model.model_fields if f"`{k}`" not in library] == []


def test_every_setting_is_read_by_some_code() -> None:
    # one whose only value is its default needs no reader
    exempt = {"libvirt.connection"}
    code = "\n".join(
        p.read_text()
        for p in sorted((ROOT / "appliance").rglob("*.py"))
        if p.parent.name != "config" or p.name == "catalogue.py"
    )
    unread = [
        k
        for k, _ in keys(HostSettings)
        if k not in exempt and not re.search(rf"\.{k.split('.')[-1]}\b", code)
    ]
    assert unread == []


def commands() -> dict[str, Any]:
    return dict(getattr(typer.main.get_command(app), "commands", {}))


def verbs() -> list[str]:
    return sorted(commands())


def test_every_verb_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"^\| `hotcell ([a-z-]+)` \|", COMMANDS, re.MULTILINE))
    assert documented == set(verbs())


def test_every_verb_has_help() -> None:
    command = typer.main.get_command(app)
    assert [n for n, c in getattr(command, "commands", {}).items() if not (c.help or "").strip()] == []


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*?##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_target_is_documented_and_phony() -> None:
    documented = set(re.findall(r"^\| `make ([a-z-]+)` \|", COMMANDS, re.MULTILINE))
    assert documented == targets()
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert set(phony.group(1).split()) == targets()


def slug(heading: str) -> str:
    """The anchor of a heading, as Git hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_is_dead(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        aim = (page.parent / file).resolve() if file else page
        assert aim.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", aim.read_text(), re.MULTILINE)
            assert anchor in {slug(h) for h in headings}, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_named_in_the_documentation_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:appliance|agent|api|ansible|images|tests|tools|requirements)/[\w./-]*)`", page.read_text()
    )
    assert [n for n in named if "NAME" not in n and not (ROOT / n).exists()] == []
    used = set(
        re.findall(
            r"hotcell ([a-z]+)\b(?! is| stands)", " ".join(re.findall(r"`([^`\n]+)`", page.read_text()))
        )
    )
    assert used <= set(verbs()) | {"hotcell"}, f"{page.name} names verbs that do not exist"


def test_the_examples_of_the_library_load(tmp_path: Path) -> None:
    blocks = re.findall(
        r"```toml\n# mine/(\S+\.toml)\n(.*?)```", (ROOT / "docs/your-model.md").read_text(), re.DOTALL
    )
    assert len(blocks) == 2
    for name, text in blocks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = load_library([tmp_path])
    assert {f"{Path(name).parent}/{Path(name).stem}" for name, _ in blocks} <= set(found.files)
    assert "{targets}" in found.scenario("two-targets").task


def test_the_page_names_the_verbs_that_take_no_json() -> None:
    without = {
        v for v, c in commands().items() if c.params and "--json" not in [o for p in c.params for o in p.opts]
    }
    assert set(re.findall(r"`([a-z]+)`", COMMANDS.split("except")[1].split(".")[0])) == without


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text()))
    pages = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md")}
    assert pages - linked == set()


def test_the_changelog_keeps_its_form() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    assert all(re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", v) for v in versions[1:])
    kinds = {line for line in lines if line.startswith("### ")}
    assert kinds <= {f"### {k}" for k in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")}


def test_the_glossary_has_every_word_of_the_trade() -> None:
    glossary = (ROOT / "docs/architecture.md").read_text().split("## Stages")[0]
    words = re.findall(r"\*\*(\w+)\*\*", glossary)
    wanted = {"subject", "agent", "qga", "brain", "machine", "cell", "image", "baseline", "measure", "policy"}
    wanted |= {"scenario", "trial", "control", "bundle", "scorecard", "verdict", "claim", "void"}
    assert wanted <= set(words)
    assert len(words) == len(set(words))


def test_the_documents_keep_to_short_lines() -> None:
    long = [
        f"{p.relative_to(ROOT)}:{i}"
        for p in PAGES
        for i, line in enumerate(p.read_text().splitlines(), 1)
        if len(line) > 120 and not line.startswith(("|", "reset ->"))
    ]
    assert long == []
