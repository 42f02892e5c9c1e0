"""Verbs that do their work in the command's own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.cli import local
from appliance.host.paths import Paths
from tests.fakes.calling import Cli, calling
from tests.fakes.running import short_home


@pytest.fixture
def home() -> Iterator[Paths]:
    with short_home() as paths:
        yield paths


@pytest.fixture
def cli(home: Paths, capsys: pytest.CaptureFixture[str]) -> Cli:
    return calling(home, capsys)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Images that a prune removes; a build makes what it is asked for."""
    old = [SimpleNamespace(recipe="world", digest="a" * 64, folder=Path("/images/a"))]
    monkeypatch.setattr("appliance.build.prune_images", lambda *_: old)
    monkeypatch.setattr(local, "build_all", lambda _, recipes: [{"recipe": r} for r in recipes])
    return old


@pytest.mark.usefixtures("shelf")
def test_a_build_tells_as_json_what_it_built_and_removed(cli: Cli) -> None:
    removed = [{"recipe": "world", "digest": "a" * 64, "folder": "/images/a"}]
    assert cli("build", "--prune", "--json").json == {"built": [], "removed": removed}
    both = cli("build", "world", "--prune", "--json")
    assert both.json == {"built": [{"recipe": "world"}], "removed": removed}
    assert both.err == f"removed world {'a' * 12}\n"
    assert cli("build", "world", "--json").json == {"built": [{"recipe": "world"}], "removed": []}


def test_a_prune_that_finds_nothing_is_json_too(cli: Cli, shelf: list[SimpleNamespace]) -> None:
    shelf.clear()
    ran = cli("build", "--prune", "--json")
    assert (ran.json, ran.err) == ({"built": [], "removed": []}, "nothing to remove\n")


def test_a_build_of_nothing_is_refused(cli: Cli) -> None:
    assert "no recipe is named" in cli("build").err
