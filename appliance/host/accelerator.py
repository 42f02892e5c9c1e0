"""How guests will execute: KVM if it is shown to run one, else TCG (software).

That /dev/kvm exists, opens and creates a vCPU proves nothing. There are hosts whose KVM interprets guest
kernels at 1.6 million instructions a second, or lacks a register that QEMU sets, and on both a stock
kernel never comes up. So a micro guest is booted with the CPU model the cells use, with a short limit;
if an image has been built, its kernel is booted too. The finding is kept for this boot of the host and
this QEMU.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from appliance.errors import CommandError, PrerequisiteError
from appliance.host import command, microguest
from appliance.host.paths import Paths
from appliance.model import Accelerator, Frozen, printable

QEMU: Final = "qemu-system-x86_64"
_KVM: Final = Path("/dev/kvm")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
# The CPU model of the cells' machines: a probe with another one shows nothing about them.
_CPU: Final = {Accelerator.KVM: "host", Accelerator.TCG: "max"}
_KERNEL_LIMIT_S: Final = 30.0  # TCG needs 2 s on an idle host, KVM under 1 s
_KERNEL_SAYS: Final = "Linux version"
_FORMAT: Final = 1
Wanted = Literal["auto", "kvm", "tcg"]


class Attempt(Frozen):
    """One guest booted under one accelerator. ``problem`` is empty if it passed."""

    accelerator: Accelerator
    guest: Literal["micro", "kernel"]
    passed: bool
    seconds: float
    problem: str


class AcceleratorReport(Frozen):
    """What was tried and what follows. ``chosen`` is None if neither accelerator ran the micro guest."""

    format: int = _FORMAT
    wanted: Wanted
    chosen: Accelerator | None
    kvm_device: bool
    attempts: tuple[Attempt, ...]
    qemu: str
    boot_id: str
    from_cache: bool = False

    @property
    def line(self) -> str:
        """One line for a person: what is used, and why not KVM."""
        failed = [a for a in self.attempts if not a.passed]
        why = failed[0].problem if failed else "" if self.kvm_device else "there is no /dev/kvm"
        if self.chosen is Accelerator.KVM:
            return "KVM: booted a guest under it"
        if self.chosen is Accelerator.TCG:
            chosen_by = "as configured" if self.wanted == "tcg" else f"KVM is not usable here: {why}"
            return f"TCG (software, about ten times slower than KVM); {chosen_by}"
        return f"neither KVM nor TCG runs a guest: {why}"


def probe_accelerator(
    paths: Paths, limit_s: float = 10.0, wanted: Wanted = "auto", *, fresh: bool = False
) -> AcceleratorReport:
    """Boot guests and report which accelerator works. Takes 0.2 s to 2 x ``limit_s``; cached after that.

    Args:
        paths: the cache holds the finding and, maybe, images with kernels.
        limit_s: seconds for the micro guest; hardware KVM and TCG both need under half a second.
        wanted: ``kvm`` and ``tcg`` try only that one.
        fresh: do not use what an earlier probe found.

    Raises:
        CommandError: QEMU is not installed.
    """
    qemu = qemu_version()
    boot_id = _BOOT_ID.read_text().strip()
    kernels = sorted(paths.images.glob("*/vmlinuz"), key=lambda p: p.stat().st_mtime)[-1:]
    kept = paths.cache / f"accelerator-{wanted}{'-kernel' if kernels else ''}.json"
    if not fresh and (known := _read(kept, qemu, boot_id)):
        return known
    report = _decide(wanted, _KVM.exists(), qemu, boot_id, _attempts(wanted, limit_s, kernels))
    if report.chosen is not None:  # a total failure may be the load of the moment: look again next time
        _write(kept, report)
    return report


def select_accelerator(paths: Paths, wanted: Wanted = "auto") -> AcceleratorReport:
    """As :func:`probe_accelerator`, for callers that cannot go on without one; ``chosen`` is not None.

    Raises:
        PrerequisiteError: no accelerator works, or the one that the settings demand does not.
    """
    report = probe_accelerator(paths, wanted=wanted)
    if report.chosen is None:
        tried = (
            "; ".join(f"{a.accelerator}: {a.problem}" for a in report.attempts) or "nothing could be tried"
        )
        raise PrerequisiteError(
            f"no guest can run here ({tried})",
            hint='set accelerator = "auto" in hotcell.toml to fall back to TCG'
            if wanted == "kvm"
            else "run `hotcell doctor`",
        )
    return report


def qemu_version() -> str:
    """First line of QEMU's version.

    Raises:
        CommandError: QEMU is not installed.
    """
    program = command.require(QEMU, "qemu-system-x86")
    return command.run([program, "--version"], timeout=20).stdout.splitlines()[0].strip()


def boot_micro(accelerator: Accelerator, limit_s: float) -> Attempt:
    """Boot the micro guest. Passed only if it wrote every letter and left through the exit device."""
    with tempfile.TemporaryDirectory(prefix="hotcell-probe-") as folder:
        work = Path(folder)
        (work / "micro").write_bytes(microguest.image())
        extra = ["-m", "32", "-kernel", "micro", "-debugcon", "file:letters"]
        extra += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        started = time.monotonic()
        ended = _qemu(accelerator, extra, work, limit_s)
        letters = (work / "letters").read_text(errors="replace") if (work / "letters").exists() else ""
    passed = ended.rc == microguest.EXIT_STATUS and letters == microguest.MARKER
    problem = "" if passed else _why(ended, microguest.progress(letters), limit_s)
    return Attempt(
        accelerator=accelerator,
        guest="micro",
        passed=passed,
        seconds=round(time.monotonic() - started, 3),
        problem=problem,
    )


def boot_kernel(accelerator: Accelerator, kernel: Path, limit_s: float = _KERNEL_LIMIT_S) -> Attempt:
    """Boot a real kernel without a disk. Passed if it printed its version and went down in its own panic."""
    with tempfile.TemporaryDirectory(prefix="hotcell-probe-") as folder:
        work = Path(folder)
        extra = ["-m", "256", "-kernel", os.fspath(kernel), "-append", "console=ttyS0 panic=-1"]
        started = time.monotonic()
        ended = _qemu(accelerator, [*extra, "-serial", "file:console"], work, limit_s)
        said = (work / "console").read_text(errors="replace") if (work / "console").exists() else ""
    passed = ended.rc == 0 and _KERNEL_SAYS in said
    last = printable(said.strip().splitlines()[-1], 120) if said.strip() else "nothing"
    return Attempt(
        accelerator=accelerator,
        guest="kernel",
        passed=passed,
        seconds=round(time.monotonic() - started, 3),
        problem="" if passed else _why(ended, f"the image's kernel wrote {last}", limit_s),
    )


def _attempts(wanted: Wanted, limit_s: float, kernels: Sequence[Path]) -> Iterator[Attempt]:
    if wanted != "tcg" and _KVM.exists():
        micro = boot_micro(Accelerator.KVM, limit_s)
        yield micro
        if micro.passed:
            yield from (boot_kernel(Accelerator.KVM, k) for k in kernels)
    if wanted != "kvm":
        yield boot_micro(Accelerator.TCG, limit_s)


def _decide(
    wanted: Wanted, kvm_device: bool, qemu: str, boot_id: str, attempts: Iterator[Attempt]
) -> AcceleratorReport:
    """Pure but for the boots that ``attempts`` makes: stops at the first accelerator that passed all."""
    made: list[Attempt] = []
    for attempt in attempts:
        if attempt.accelerator is Accelerator.TCG and _all_passed(made, Accelerator.KVM):
            break
        made.append(attempt)
    chosen = next((a for a in (Accelerator.KVM, Accelerator.TCG) if _all_passed(made, a)), None)
    return AcceleratorReport(
        wanted=wanted,
        chosen=chosen,
        kvm_device=kvm_device,
        attempts=tuple(made),
        qemu=qemu,
        boot_id=boot_id,
    )


def _all_passed(attempts: Sequence[Attempt], accelerator: Accelerator) -> bool:
    own = [a.passed for a in attempts if a.accelerator is accelerator]
    return bool(own) and all(own)


class _Ended(Frozen):
    rc: int | None  # None: it ran out of time
    stderr: str


def _qemu(accelerator: Accelerator, extra: Sequence[str], work: Path, limit_s: float) -> _Ended:
    argv = [command.require(QEMU, "qemu-system-x86"), "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-no-reboot", "-machine", "q35", "-accel", accelerator.value, "-cpu", _CPU[accelerator], *extra]
    try:
        # Tied: a guest that hangs under KVM would outlive us for good, and its command line names no home.
        done = command.run(argv, timeout=limit_s, check=False, cwd=work, tied=True)
    except CommandError as e:
        return _Ended(rc=None, stderr=e.message)
    return _Ended(rc=done.rc, stderr=done.stderr)


def _why(ended: _Ended, progress: str, limit_s: float) -> str:
    if ended.rc is None:
        return f"{progress} within {limit_s:g} s"
    said = [line for line in ended.stderr.splitlines() if "warning:" not in line]
    detail = printable(said[0].removeprefix(f"{QEMU}: ").removeprefix("error: "), 160) if said else progress
    return f"QEMU ended with status {ended.rc}: {detail}"


def _read(file: Path, qemu: str, boot_id: str) -> AcceleratorReport | None:
    try:
        known = AcceleratorReport.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
    fits = (known.format, known.qemu, known.boot_id, known.kvm_device) == (
        _FORMAT,
        qemu,
        boot_id,
        _KVM.exists(),
    )
    return known.model_copy(update={"from_cache": True}) if fits else None


def _write(file: Path, report: AcceleratorReport) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(report.model_dump_json(indent=2))
    new.replace(file)
