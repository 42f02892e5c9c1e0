"""What this host lacks: each finding says what was found, what is needed and what to do.

``ok`` needs nothing; ``warn`` works with less than it could; ``fail`` stops trials. Judging is pure:
facts in, findings out.
"""

from __future__ import annotations

from typing import Final, Literal

from appliance.config import HostSettings, load_library
from appliance.config.catalogue import BUILT_IN
from appliance.errors import ConfigError
from appliance.host import firmware
from appliance.host.facts import PROGRAMS, HostFacts, gather
from appliance.host.paths import Paths
from appliance.host.pci import PciDevice, group_members
from appliance.model import Accelerator, Frozen

Status = Literal["ok", "warn", "fail"]
_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
# Built images take 8 GB, a build in progress as much again, a trial's overlays and baselines up to 8 GB.
DISK_WANTED: Final = 30 * _GIB
DISK_LEAST: Final = 15 * _GIB
_YEAR_2025: Final = 1_735_689_600.0
_SETUP: Final = "make setup"
# Nothing uses nftables yet: the seal is a namespace without an uplink, and needs no rules.
_LATER: Final = "for containment measures, of which this version has none; trials run without"


class Finding(Frozen):
    """One check."""

    name: str
    status: Status
    found: str
    needed: str
    hint: str = ""


class DoctorReport(Frozen):
    """All checks of one look at the host."""

    findings: tuple[Finding, ...]

    @property
    def fit(self) -> bool:
        """True if trials can run here."""
        return all(f.status != "fail" for f in self.findings)

    @property
    def summary(self) -> str:
        """One closing line."""
        fails = [f.name for f in self.findings if f.status == "fail"]
        warns = [f.name for f in self.findings if f.status == "warn"]
        if fails:
            return f"this host cannot run trials yet: {', '.join(fails)}"
        return "this host can run trials" + (f"; it could do better at: {', '.join(warns)}" if warns else "")


def doctor(paths: Paths, settings: HostSettings | None = None) -> DoctorReport:
    """Look at this host and judge it. Needs root for a full answer; without it says so and goes on."""
    wanted = settings or HostSettings()
    return DoctorReport(findings=(*judge(gather(paths, wanted.accelerator), wanted), library(wanted)))


def library(settings: HostSettings) -> Finding:
    """Whether every file of the library, built in and the user's own, can be read."""
    needed = "subjects, scenarios and policies without a fault"
    try:
        found = load_library(settings=settings)
    except ConfigError as e:
        return Finding(name="library", status="fail", found=e.message, needed=needed, hint=e.hint)
    own = sum(BUILT_IN not in f.parents for f in found.files.values())
    text = f"{len(found.files)} subjects, scenarios and policies, {own} of them of your own"
    return Finding(name="library", status="ok", found=text, needed=needed)


def render(report: DoctorReport) -> list[str]:
    """The report as plain lines, aligned, the summary last."""
    width = max((len(f.name) for f in report.findings), default=0)
    lines: list[str] = []
    for f in report.findings:
        lines.append(f"{f.status:<4}  {f.name:<{width}}  {f.found}")
        if f.status != "ok":
            lines.append(f"{'':{width + 6}}  needed: {f.needed}")
            lines.append(f"{'':{width + 6}}  what to do: {f.hint}")
    return [*lines, "", report.summary]


def judge(facts: HostFacts, settings: HostSettings) -> tuple[Finding, ...]:
    """Facts to findings; pure."""
    return (
        _check(
            "root", facts.euid == 0, "yes" if facts.euid == 0 else f"user id {facts.euid}", "root", "use sudo"
        ),
        _accelerator(facts),
        *_cpu(facts, settings),
        *_programs(facts),
        _libvirt(facts),
        *_network(facts),
        _memory(facts, settings),
        _disk("disk of the home", facts.capacity.disk_free, "HOTCELL_HOME"),
        _disk("disk of the cache", facts.cache_free, "HOTCELL_CACHE"),
        _clock(facts),
        *_passthrough(facts),
    )


def _check(name: str, good: bool, found: str, needed: str, hint: str, bad: Status = "fail") -> Finding:
    return Finding(
        name=name, status="ok" if good else bad, found=found, needed=needed, hint="" if good else hint
    )


def _accelerator(facts: HostFacts) -> Finding:
    report, needed = facts.accelerator, "KVM that boots a guest; TCG works, about ten times slower"
    if report is None or report.chosen is None:
        return Finding(
            name="accelerator",
            status="fail",
            found=report.line if report else facts.accelerator_problem,
            needed=needed,
            hint=f"{_SETUP}; then check that QEMU starts at all: qemu-system-x86_64 --version",
        )
    slow = report.chosen is Accelerator.TCG and report.wanted != "tcg"
    hint = (
        "use a host whose own KVM works, or accept the slower TCG"
        if report.kvm_device
        else "enable VT-x or AMD-V in the firmware and load kvm_intel or kvm_amd"
    )
    return _check("accelerator", not slow, report.line, needed, hint, "warn")


def _cpu(facts: HostFacts, settings: HostSettings) -> tuple[Finding, ...]:
    cores, wanted = facts.capacity.cores, settings.guests.vcpus
    findings = [
        _check(
            "cores",
            cores >= wanted,
            str(cores),
            f"{wanted}, as many as a machine has",
            "trials work but take longer; or lower guests.vcpus",
            "warn",
        )
    ]
    kvm = facts.accelerator is not None and facts.accelerator.chosen is Accelerator.KVM
    if kvm:  # under TCG the guest's AVX2 is emulated
        avx2 = "avx2" in facts.cpu_flags
        findings.append(
            _check("avx2", avx2, "yes" if avx2 else "no", "AVX2 for vLLM on CPU", 'set accelerator = "tcg"')
        )
    return tuple(findings)


def _programs(facts: HostFacts) -> tuple[Finding, ...]:
    return tuple(
        _check(
            name,
            bool(facts.programs.get(name)),
            facts.programs.get(name) or "missing",
            f"nft, {_LATER}" if name == "nft" else name,
            f"{_SETUP}, or apt-get install {package}",
            "warn" if name == "nft" else "fail",
        )
        for name, package, _ in PROGRAMS
    )


def _libvirt(facts: HostFacts) -> Finding:
    return _check(
        "libvirt",
        bool(facts.libvirt_driver),
        f"{facts.libvirt_version}, {facts.libvirt_driver}" if facts.libvirt_driver else "no QEMU driver",
        "libvirt's QEMU driver (no daemon is needed)",
        f"{_SETUP}, or apt-get install libvirt-daemon-driver-qemu",
    )


def _network(facts: HostFacts) -> tuple[Finding, ...]:
    rights = "run as root; in a container, allow CAP_NET_ADMIN and CAP_SYS_ADMIN"
    checks = (
        ("network namespaces", facts.netns_problem, "a namespace of one's own", rights),
        ("bridge", facts.bridge_problem, "a bridge in a new namespace", f"modprobe bridge; {rights}"),
        ("tap", facts.tun_problem, "a tap device in a new namespace", f"modprobe tun; {rights}"),
        (
            "packet capture",
            facts.capture_problem,
            "tcpdump that opens an interface",
            f"modprobe af_packet; {rights}",
        ),
    )
    rules = _check(
        "nftables rules",
        not facts.nftables_problem,
        facts.nftables_problem or "works",
        f"inet rules with conntrack, and bridge rules, that load: {_LATER}",
        f"modprobe nf_tables nf_conntrack; {rights}",
        "warn",
    )
    return (*(_check(n, not bad, bad or "works", needed, hint) for n, bad, needed, hint in checks), rules)


def _memory(facts: HostFacts, settings: HostSettings) -> Finding:
    guests = settings.guests
    needed = (2 * guests.model_memory_mib + guests.world_memory_mib + guests.headroom_mib) * _MIB
    have = facts.capacity.memory_available
    return _check(
        "memory",
        have >= needed,
        f"{have / _GIB:.1f} GiB available of {facts.capacity.memory_total / _GIB:.1f}",
        f"{needed / _GIB:.1f} GiB: origin, one target, world and {guests.headroom_mib} MiB of headroom",
        "stop what uses memory, or lower guests.model_memory_mib (at least 3072 for the CPU images)",
        "warn" if have >= needed // 2 else "fail",
    )


def _disk(name: str, free: int, variable: str) -> Finding:
    return _check(
        name,
        free >= DISK_WANTED,
        f"{free / _GIB:.1f} GiB free",
        f"{DISK_WANTED // _GIB} GiB for images, baselines and evidence; at least {DISK_LEAST // _GIB}",
        f"free disk space, or point {variable} to a larger disk",
        "warn" if free >= DISK_LEAST else "fail",
    )


def _clock(facts: HostFacts) -> Finding:
    sane = facts.wall_clock >= _YEAR_2025
    return _check(
        "clock",
        sane,
        f"source {facts.clock_source or 'unknown'}" if sane else "the date is before 2025",
        "a date that can be right, since evidence carries it",
        "set the clock: date -s, or start a time service",
    )


def _passthrough(facts: HostFacts) -> tuple[Finding, ...]:
    cards = [d for d in facts.devices if d.display]
    if not cards:
        return (Finding(name="GPU", status="ok", found="none; CPU images are used", needed="none"),)
    iommu = _check(
        "IOMMU",
        facts.iommu_groups > 0,
        f"{facts.iommu_groups} groups",
        "IOMMU groups, to hand a GPU to a machine",
        "enable VT-d or AMD-Vi in the firmware and boot with intel_iommu=on or amd_iommu=on",
        "warn",
    )
    uefi = _check(
        "UEFI firmware",
        bool(facts.uefi),
        facts.uefi or "none",
        "OVMF without Secure Boot, for machines that a GPU is handed to",
        f"{_SETUP}, or {firmware.HINT}",
        "warn",
    )
    return (iommu, uefi, *(_gpu(card, facts.devices) for card in cards))


def _gpu(card: PciDevice, devices: tuple[PciDevice, ...]) -> Finding:
    if card.group is None:
        return Finding(
            name="GPU",
            status="warn",
            found=f"{card.label}, in no IOMMU group",
            needed="a group of its own",
            hint="see IOMMU above; CPU images work without",
        )
    others = [d.address for d in group_members(card.group, devices) if d.address[:-2] != card.address[:-2]]
    found = f"{card.label}, group {card.group}, driver {card.driver or 'none'}"
    if others:
        return Finding(
            name="GPU",
            status="warn",
            found=f"{found}, shares its group with {', '.join(others)}",
            needed="a group that holds only the functions of this card",
            hint="move the card to another slot, or enable ACS in the firmware",
        )
    return _check(
        "GPU",
        card.reset,
        found if card.reset else f"{found}, and no way to reset it",
        "a group of its own, and a device reset between trials",
        "a card that the kernel cannot reset (no reset file in sysfs) cannot be given to a second trial",
        "warn",
    )
