"""What the host is like, found by trying things and reading files. No judgement: that is ``doctor``'s.

Whatever is tried leaves nothing behind: network objects are made in a namespace that ends with the
command that made it.
"""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Final

from appliance.errors import HotcellError
from appliance.host import command, firmware, pci
from appliance.host.accelerator import AcceleratorReport, Wanted, probe_accelerator
from appliance.host.capacity import HostCapacity, host_capacity
from appliance.host.paths import Paths
from appliance.model import Frozen, printable

# program, its Debian package, arguments that print its version
PROGRAMS: Final = (
    ("qemu-system-x86_64", "qemu-system-x86", ("--version",)),
    ("qemu-img", "qemu-utils", ("--version",)),
    ("nft", "nftables", ("--version",)),
    ("ip", "iproute2", ("-V",)),
    ("tcpdump", "tcpdump", ("--version",)),
    ("mmdebstrap", "mmdebstrap", ("--version",)),
    ("mkfs.ext4", "e2fsprogs", ("-V",)),
    ("unshare", "util-linux", ("--version",)),
)
_DRIVER: Final = "libvirt_driver_qemu.so"
_LIBVIRT_FOLDERS: Final = tuple(
    Path("/usr") / lib / "libvirt/connection-driver" for lib in ("lib/x86_64-linux-gnu", "lib64", "lib")
)
_RULES: Final = b"""
table inet probe {
  chain a {
    type filter hook forward priority 0; policy drop;
    ct state established accept
  }
}
table bridge probe {
  chain b {
    type filter hook forward priority 0; policy drop;
  }
}
"""


class HostFacts(Frozen):
    """Everything the doctor judges. A text that names a problem is empty if there was none."""

    euid: int
    kernel: str
    cpu_flags: frozenset[str]
    accelerator: AcceleratorReport | None
    accelerator_problem: str
    programs: dict[str, str]  # version by name; "" is missing
    libvirt_driver: str  # path of the QEMU driver; "" is missing
    libvirt_version: str
    netns_problem: str
    bridge_problem: str
    tun_problem: str
    nftables_problem: str
    capture_problem: str
    capacity: HostCapacity
    cache_free: int  # bytes on the file system of the cache
    iommu_groups: int
    devices: tuple[pci.PciDevice, ...]
    uefi: str  # path of the firmware; "" is missing
    clock_source: str
    wall_clock: float


def gather(
    paths: Paths, wanted: Wanted = "auto", *, sysfs: Path = pci.SYSFS, limit_s: float = 10.0
) -> HostFacts:
    """Look at this host; takes about a second, or up to 2 x ``limit_s`` where KVM is there and useless."""
    accelerator, problem = _accelerator(paths, wanted, limit_s)
    driver = next((f / _DRIVER for f in _LIBVIRT_FOLDERS if (f / _DRIVER).is_file()), None)
    in_namespace = ("unshare", "--net", "--")
    return HostFacts(
        euid=os.geteuid(),
        kernel=platform.release(),
        cpu_flags=_cpu_flags(Path("/proc/cpuinfo")),
        accelerator=accelerator,
        accelerator_problem=problem,
        programs={name: _version(name, args) for name, _, args in PROGRAMS},
        libvirt_driver=os.fspath(driver or ""),
        libvirt_version=_libvirt_version(driver),
        netns_problem=_try(*in_namespace, "true"),
        bridge_problem=_try(*in_namespace, "ip", "link", "add", "probe0", "type", "bridge"),
        tun_problem=_try(*in_namespace, "ip", "tuntap", "add", "probe0", "mode", "tap"),
        nftables_problem=_try(*in_namespace, "nft", "-f", "-", stdin=_RULES),
        capture_problem=_try(*in_namespace, "tcpdump", "-i", "any", "-L"),
        capacity=host_capacity(paths.home),
        cache_free=host_capacity(paths.cache).disk_free,
        iommu_groups=pci.iommu_group_count(sysfs),
        devices=pci.pci_devices(sysfs),
        uefi=os.fspath(uefi.code) if (uefi := firmware.find_uefi()) else "",
        clock_source=_text(sysfs / "devices/system/clocksource/clocksource0/current_clocksource"),
        wall_clock=time.time(),
    )


def _accelerator(paths: Paths, wanted: Wanted, limit_s: float) -> tuple[AcceleratorReport | None, str]:
    try:
        return probe_accelerator(paths, limit_s, wanted, fresh=True), ""
    except (HotcellError, OSError) as e:
        return None, printable(str(e).splitlines()[0])


def _try(*argv: str, stdin: bytes | None = None) -> str:
    """Run a command that should succeed; the problem in one line, or nothing."""
    try:
        done = command.run(argv, timeout=20, check=False, stdin=stdin)
    except HotcellError as e:
        return printable(e.message.splitlines()[0])
    if done.rc == 0:
        return ""
    said = (done.stderr or done.stdout).strip().splitlines()
    return printable(said[0]) if said else f"exit status {done.rc}"


def _version(program: str, args: tuple[str, ...]) -> str:
    try:
        done = command.run([command.require(program, program), *args], timeout=20, check=False)
    except HotcellError:
        return ""
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    found = re.search(r"\d+\.\d[\w.+~-]*", lines[0]) if lines else None
    return found.group() if found else "present"


def _libvirt_version(driver: Path | None) -> str:
    """From the library's file name beside the driver (``libvirt.so.0.9000.0`` is 9.0.0)."""
    if driver is None:
        return ""
    for library in sorted(driver.parents[2].glob("libvirt.so.0.*.*")):
        major_minor, patch = library.name.split(".")[-2:]
        if major_minor.isdigit() and patch.isdigit():
            return f"{int(major_minor) // 1000}.{int(major_minor) % 1000}.{patch}"
    return "present"


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _text(file: Path) -> str:
    try:
        return printable(file.read_text(errors="replace").strip())
    except OSError:
        return ""
