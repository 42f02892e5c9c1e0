"""PCI devices and IOMMU groups, read from sysfs; its root is an argument, so tests can bring their own."""

from __future__ import annotations

from pathlib import Path

from appliance.model import Frozen

SYSFS = Path("/sys")
_DISPLAY = 0x03  # PCI base class "display controller": VGA 0300, XGA 0301, 3D 0302, other 0380
_BRIDGE = 0x06
_VENDORS = {"10de": "NVIDIA", "1002": "AMD", "8086": "Intel", "1234": "QEMU"}


class PciDevice(Frozen):
    """One PCI function. ``driver`` and ``group`` are None if it has none."""

    address: str
    pci_class: int
    vendor: str
    device: str
    driver: str | None
    group: int | None
    reset: bool

    @property
    def display(self) -> bool:
        """True for a GPU or any other display controller."""
        return self.pci_class >> 16 == _DISPLAY

    @property
    def bridge(self) -> bool:
        """True for a bridge; it may share a group with a passed-through device."""
        return self.pci_class >> 16 == _BRIDGE

    @property
    def label(self) -> str:
        """For people: ``NVIDIA 10de:2335 at 0000:01:00.0``."""
        return f"{_VENDORS.get(self.vendor, 'device')} {self.vendor}:{self.device} at {self.address}"


def pci_devices(sysfs: Path = SYSFS) -> tuple[PciDevice, ...]:
    """All PCI functions by address; one that vanishes while it is read, or cannot be parsed, is left out."""
    folder = sysfs / "bus/pci/devices"
    found = (_device(d) for d in sorted(folder.iterdir())) if folder.is_dir() else ()
    return tuple(d for d in found if d is not None)


def group_members(group: int, devices: tuple[PciDevice, ...]) -> tuple[PciDevice, ...]:
    """Functions that are passed through together, bridges left out."""
    return tuple(d for d in devices if d.group == group and not d.bridge)


def iommu_group_count(sysfs: Path = SYSFS) -> int:
    """Number of IOMMU groups; 0 means that no device can be passed through."""
    folder = sysfs / "kernel/iommu_groups"
    return sum(1 for d in folder.iterdir() if d.name.isdigit()) if folder.is_dir() else 0


def _device(folder: Path) -> PciDevice | None:
    try:
        group = _target(folder / "iommu_group")
        return PciDevice(
            address=folder.name,
            pci_class=int((folder / "class").read_text(), 16),
            vendor=_hex4(folder / "vendor"),
            device=_hex4(folder / "device"),
            driver=_target(folder / "driver"),
            group=int(group) if group is not None else None,
            reset=(folder / "reset").exists(),
        )
    except (OSError, ValueError):
        return None


def _hex4(file: Path) -> str:
    return f"{int(file.read_text(), 16):04x}"


def _target(link: Path) -> str | None:
    return link.readlink().name if link.is_symlink() else None
