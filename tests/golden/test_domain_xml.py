"""Domain XML is a pure function of the specification, held to committed files."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.cell.domain import OWNER_NS, QEMU_NS, DomainSpec, domain_xml
from appliance.model import Accelerator

from .cases import CASES, domain_spec, indented
from .conftest import DATA, difference


@pytest.mark.parametrize("case", CASES)
def test_the_xml_is_the_golden_one(case: str, golden: Callable[[str, str], None]) -> None:
    golden(f"{case}.xml", indented(domain_xml(domain_spec(case))))


def test_every_golden_file_has_its_case() -> None:
    assert {p.stem for p in DATA.glob("*.xml")} == set(CASES)


def test_a_difference_is_shown_as_a_diff(tmp_path: Path) -> None:
    path = DATA / "clone-tcg.xml"
    assert difference(path, path.read_text()) == ""
    diff = difference(path, path.read_text().replace(">512<", ">513<"))
    assert '-  <memory unit="MiB">512</memory>' in diff
    assert '+  <memory unit="MiB">513</memory>' in diff
    assert difference(tmp_path / "missing.xml", "made\n").endswith("+made")


def tree(case: str, **changes: object) -> ET.Element:
    return ET.fromstring(domain_xml(DomainSpec.model_validate(domain_spec(case).model_dump() | changes)))


def arguments(root: ET.Element) -> list[str]:
    return [a.get("value", "") for a in root.iterfind(f"{{{QEMU_NS}}}commandline/{{{QEMU_NS}}}arg")]


@pytest.mark.parametrize("case", CASES)
def test_what_every_machine_must_and_must_not_have(case: str) -> None:
    root = tree(case)
    assert [root.findtext(e) for e in ("on_poweroff", "on_reboot", "on_crash")] == ["destroy"] * 3
    owner = root.find(f"metadata/{{{OWNER_NS}}}owner")
    assert owner is not None
    assert owner.text == "hotcell"
    nics = root.findall("devices/interface")
    assert [n.get("type") for n in nics] == ["bridge"], "one network back end, and it is a tap on our bridge"
    for way_out in (
        "graphics",
        "filesystem",
        "redirdev",
        "shmem",
        "vsock",
        "tpm",
        "audio",
        "smartcard",
    ):
        assert root.find(f"devices/{way_out}") is None
    assert [c.get("type") for c in root.findall("devices/channel")] == ["unix"] * 3
    assert len(root.findall("devices/disk")) == 1


def test_a_clone_maps_privately_and_waits_for_its_state_and_a_template_does_neither() -> None:
    assert "share=off" in arguments(tree("clone-tcg"))[1]
    assert arguments(tree("clone-tcg"))[-2:] == ["-incoming", "defer"]
    assert "share=on" in arguments(tree("template-tcg"))[1]
    assert "-incoming" not in arguments(tree("template-tcg"))


def test_kvm_and_tcg_differ_in_type_and_cpu_only() -> None:
    kvm = domain_xml(domain_spec("clone-kvm"))
    tcg = domain_xml(domain_spec("clone-kvm").model_copy(update={"accelerator": Accelerator.TCG}))
    assert kvm.replace('type="kvm"', 'type="qemu"').replace("host-passthrough", "maximum") == tcg


UEFI = {"uefi-kvm", "uefi-device-kvm"}


def test_only_uefi_has_flash() -> None:
    for case in UEFI:
        boot = tree(case).find("os")
        assert boot is not None
        loader = boot.find("loader")
        assert loader is not None
        assert loader.attrib == {"readonly": "yes", "type": "pflash"}
        assert str(boot.findtext("nvram")).endswith("/nvram.fd")
    for case in set(CASES) - UEFI:
        other = tree(case).find("os")
        assert other is not None
        assert (other.find("nvram"), other.find("loader")) == (None, None)


def test_only_what_is_to_have_a_device_has_one() -> None:
    devices = {case: len(tree(case).findall("devices/hostdev")) for case in CASES}
    assert devices == {**dict.fromkeys(CASES, 0), "uefi-device-kvm": 1}


def test_a_comma_in_a_path_stays_inside_its_option() -> None:
    """QEMU splits options at commas: ``,share=on`` in a folder's name would undo the private mapping."""
    value = arguments(tree("clone-tcg", ram_file=Path("/home/a,share=on/ram")))[1]
    assert "mem-path=/home/a,,share=on/ram,share=off" in value


@pytest.mark.parametrize("nasty", ['"><evil/>', "a&b", "<!--", "]]>"])
def test_text_is_escaped(nasty: str) -> None:
    root = tree("clone-tcg", overlay=Path(f"/x/{nasty}"), owner=nasty)
    source = root.find("devices/disk/source")
    assert source is not None
    assert source.get("file") == f"/x/{nasty}"
    assert root.find("evil") is None


def test_same_specification_same_text() -> None:
    assert domain_xml(domain_spec("clone-tcg")) == domain_xml(domain_spec("clone-tcg"))
