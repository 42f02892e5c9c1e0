"""Real builds of the world image in a cache of the test's own: killed twice, resumed, verified; and real faults.

Root, mmdebstrap and a Debian mirror are needed, no virtual machine. The rest of this tier leaves the host's
network on first use; tests are collected before that, so builds run in the network this module was loaded in.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.build import find_image, verify_image
from appliance.build.workspace import mounts_below, unmount_below
from appliance.host import command
from appliance.host.paths import Paths

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

_HOST_NET = os.open("/proc/self/ns/net", os.O_RDONLY)
_BUILD = """
import sys
from pathlib import Path
from appliance.build import BuildOptions, build_image
from appliance.errors import HotcellError
from appliance.host.paths import Paths
cache, apt = Path(sys.argv[1]), sys.argv[2]
def tell(stage, detail, fraction):
    print(stage, detail, flush=True)
try:
    build_image("world", Paths(cache / "h", cache), tell, options=BuildOptions(apt_sources=apt))
except HotcellError as e:
    print("ERROR", type(e).__name__, e, flush=True)
    sys.exit(3)
"""


# The check beforehand cannot know what else fills the disk meanwhile; this leaves it out.
_UNASKED = "from appliance.build import make\nmake.need_space = lambda *a: None\n"


class Build:
    """One build in a process of its own."""

    def __init__(self, cache: Path, project: Path, apt: str = "", before: str = "") -> None:
        self.out = cache / "out.log"
        self.log = self.out.open("wb")
        argv = [
            "nsenter",
            f"--net=/proc/self/fd/{_HOST_NET}",
            sys.executable,
            "-c",
            before + _BUILD,
            os.fspath(cache),
            apt,
        ]
        self.process = command.spawn(
            argv,
            stdout=self.log,
            stderr=self.log,
            env={"PYTHONPATH": os.fspath(project)},
            pass_fds=(_HOST_NET,),
        )

    def said(self) -> str:
        return self.out.read_text(errors="replace")

    def kill_when(self, words: str) -> None:
        """SIGKILL, as soon as the build says so."""
        while words not in self.said():
            assert self.process.poll() is None, self.said()[-2000:]
            time.sleep(0.05)
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> int:
        rc = self.process.wait()
        self.log.close()
        return rc


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    unmount_below(tmp_path)


def test_a_build_killed_twice_is_cleaned_resumed_and_sealed(cache: Path, project: Path) -> None:
    paths = Paths(cache / "h", cache)
    Build(cache, project).kill_when("base : Name the image")
    assert mounts_below(paths.building), "it died with the tree's mounts in place"
    assert not paths.images.exists()

    Build(cache, project).kill_when("pack world")
    assert mounts_below(paths.building) == ()

    last = Build(cache, project)
    assert last.end() == 0, last.said()[-2000:]
    assert "tree world" not in last.said(), "it went on from the configured tree"
    assert "configure world" not in last.said()
    assert mounts_below(cache) == ()
    assert [p.name for p in paths.building.iterdir()] == ["lock"]

    image = find_image("world", paths, project)
    assert image is not None
    verify_image(image)
    command.run(["qemu-img", "check", "-q", image.disk], timeout=60)
    packages = {p.name for p in image.record.packages}
    assert {"systemd", "openssh-server", "qemu-guest-agent", "dnsmasq-base"} <= packages
    assert (
        json.loads(command.run(["qemu-img", "info", "--output=json", image.disk], timeout=60).stdout)[
            "virtual-size"
        ]
        == image.record.disk_bytes
    )

    began = time.monotonic()
    again = Build(cache, project)
    assert again.end() == 0
    assert time.monotonic() - began < 2
    assert "up to date" in again.said()


def test_a_mirror_that_is_down_is_a_clear_error(cache: Path, project: Path) -> None:
    apt = "Types: deb\nURIs: http://127.0.0.1:9/debian\nSuites: bookworm\nComponents: main\n"
    build = Build(cache, project, apt)
    assert build.end() == 3
    assert "ERROR BuildError making the root tree failed" in build.said()
    assert "the package registry did not answer" in build.said()
    assert not (cache / "images").exists() or list((cache / "images").iterdir()) == []


@pytest.mark.parametrize("asked", [True, False])
def test_a_disk_that_is_too_small_is_a_clear_error(cache: Path, project: Path, asked: bool) -> None:
    small = cache / "small"
    small.mkdir()
    command.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", small], timeout=10)
    build = Build(small, project, before="" if asked else _UNASKED)
    assert build.end() == 3
    assert ("ERROR CapacityError" if asked else "ERROR BuildError making the root tree") in build.said()
    assert "free some disk space" in build.said()
    assert not list(small.glob("images/*"))
    assert not list(small.glob("building/*/root")), "no half tree keeps the disk full"
