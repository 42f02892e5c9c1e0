"""The shell tools: what they refuse, and that no tier is lost."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, *args: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **({"PATH": path} if path else {})}
    return subprocess.run(
        ["/bin/bash", ROOT / "tools" / name, *args],
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        check=False,
    )


def fake(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_of_own(tmp_path: Path) -> Path:
    """A PATH with the usual tools and nothing of Debian's package manager."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "mktemp", "rm", "cat", "cut", "sha256sum", "tail", "mkdir", "flock", "id"):
        (folder / name).symlink_to(next(p for d in ("/usr/bin", "/bin") if (p := Path(d, name)).exists()))
    return folder


def test_setup_on_another_system_says_what_is_needed(bin_of_own: Path) -> None:
    done = tool("setup.sh", path=str(bin_of_own))
    assert done.returncode == 1
    assert "not a Debian system" in done.stderr
    assert "what to do: use Debian 12" in done.stderr


def test_setup_with_an_old_python_says_which_is_needed(bin_of_own: Path) -> None:
    fake(bin_of_own, "apt-get", "exit 9")
    fake(bin_of_own, "python3", '[ "$1" = -V ] && echo Python 3.9.2; exit 1')
    done = tool("setup.sh", path=str(bin_of_own))
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed, found Python 3.9.2" in done.stderr


def test_setup_without_root_asks_for_it_only_if_there_is_something_to_do(bin_of_own: Path) -> None:
    fake(bin_of_own, "apt-get", "exit 9")
    fake(bin_of_own, "python3", "exit 0")
    fake(bin_of_own, "dpkg-query", "exit 1")  # nothing is installed
    (bin_of_own / "id").unlink()
    fake(bin_of_own, "id", "echo 1000")
    done = tool("setup.sh", path=str(bin_of_own))
    assert done.returncode == 1
    assert "root is needed" in done.stderr


def test_an_unknown_tier_is_a_failure_not_nothing() -> None:
    done = tool("test.sh", "no-such-tier")
    assert done.returncode == 1
    assert "there are: check unit images vm trial" in done.stderr
    assert done.stdout.splitlines()[-1] == "tiers: 0 passed, 1 failed"


def test_make_alone_lists_every_target() -> None:
    done = subprocess.run(
        ["make", "-C", ROOT, "--no-print-directory"], capture_output=True, text=True, check=True
    )
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert listed[0] == "help"
    assert {"setup", "demo", "test", "check"} <= set(listed)
