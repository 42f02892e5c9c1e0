"""Golden files: text that the code makes, committed, compared line by line."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

DATA = Path(__file__).with_name("data")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="write the golden files of tests/golden anew instead of comparing with them",
    )


def difference(path: Path, made: str) -> str:
    """A unified diff from a golden file to what was made now; empty if they are equal."""
    wanted = path.read_text() if path.exists() else ""
    lines = difflib.unified_diff(
        wanted.splitlines(), made.splitlines(), f"golden/{path.name}", "made now", lineterm=""
    )
    return "" if wanted == made else "\n".join(lines)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the golden file of that name, or write the file if so asked."""

    def check(name: str, made: str) -> None:
        path = DATA / name
        if request.config.getoption("--regenerate-golden"):
            path.write_text(made)
        elif diff := difference(path, made):
            pytest.fail(f"{diff}\nif this is wanted: pytest tests/golden --regenerate-golden", pytrace=False)

    return check
