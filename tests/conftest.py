"""Shared by every tier. Collecting tests needs no root, no network and no virtual machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from appliance.host.paths import Paths, default_paths

# A suite started in the background has SIGINT ignored, and would hand that on to every program it starts;
# tests that press Ctrl-C need it to mean something.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the settings of the host it happens to run on."""
    monkeypatch.delenv("HOTCELL_CONFIG", raising=False)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A home and a cache of the test's own. The home is not created below a long pytest path."""
    return Paths(tmp_path / "h", tmp_path / "c").make()


@pytest.fixture(scope="session")
def project() -> Path:
    """Root of the source tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def host_paths() -> Paths:
    """The host's real home and cache, as environment variables set them; for tiers that use built images."""
    return default_paths()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With HOTCELL_NO_SKIP=1 a skipped test fails its tier: real machines are tested or the tier is red."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and os.environ.get("HOTCELL_NO_SKIP") == "1":
        terminalreporter.write_line(f"{len(skipped)} skipped, and this tier may skip none", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """The exit status that goes with the line above."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if (
        os.environ.get("HOTCELL_NO_SKIP") == "1"
        and exitstatus == 0
        and reporter
        and reporter.stats.get("skipped")
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
