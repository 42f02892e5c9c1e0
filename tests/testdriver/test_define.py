"""libvirt itself takes the golden XML: each file is defined and started by its ``test`` driver.

It happens in a child process: libvirt's event loop would outlive the test otherwise. The test driver knows the
schema of every element but QEMU's own namespace, which it ignores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "golden" / "data"
FILES = sorted(DATA.glob("*.xml"))
DEFINE = textwrap.dedent(
    """
    import json, sys, libvirt
    libvirt.registerErrorHandler(lambda *_: None, None)
    connection = libvirt.open("test:///default")
    try:
        domain = connection.defineXML(sys.stdin.read())
        domain.create()
        print(json.dumps({"ok": True, "xml": domain.XMLDesc(0), "active": bool(domain.isActive())}))
    except libvirt.libvirtError as e:
        print(json.dumps({"ok": False, "error": str(e)}))
    """
)


def define(xml: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", DEFINE],
        input=xml,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def for_test_driver(xml: str) -> str:
    """The test driver runs domains of type ``test`` only; everything else stays as it is."""
    return xml.replace('type="qemu"', 'type="test"', 1).replace('type="kvm"', 'type="test"', 1)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_libvirt_takes_it_and_keeps_what_matters(path: Path) -> None:
    answer = define(for_test_driver(path.read_text()))
    assert answer["ok"], answer
    kept = str(answer["xml"])
    assert answer["active"]
    for part in (
        "<on_reboot>destroy</on_reboot>", "https://hotcell.invalid/owner/1", "org.hotcell.events", "hct01234567",
        "hcb01234567", "52:54:00:77:00:", "type='qcow2'",
    ):  # fmt: skip
        assert part in kept, f"libvirt dropped {part}"
    boots = path.stem.startswith(("template", "uefi"))
    assert ("root=/dev/vda rw" in kept) is boots, "a clone boots no kernel"
    flash = ("<loader readonly='yes' type='pflash'>" in kept, "nvram.fd</nvram>" in kept)
    assert flash == (path.stem.startswith("uefi"),) * 2


def test_there_are_files_to_define() -> None:
    assert len(FILES) >= 5


MISTAKES = {
    "an unknown unit": ('<memory unit="MiB"', '<memory unit="parsec"'),
    "an unknown action": ("destroy</on_reboot>", "explode</on_reboot>"),
    "a MAC that is none": ('mac address="52:54', 'mac address="xx:54'),
    "no name": ("<name>", "<name/><x>"),
    "an unknown bus": ('bus="virtio"', 'bus="omni"'),
}


@pytest.mark.parametrize(("old", "new"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_refused(old: str, new: str) -> None:
    xml = for_test_driver((DATA / "clone-tcg.xml").read_text())
    assert old in xml
    assert not define(xml.replace(old, new, 1))["ok"]
