"""Python packages of a recipe: downloaded on the host by its own pip configuration, checked against the lock."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from appliance.build.manifest import sha256_file
from appliance.build.workspace import explain
from appliance.errors import BuildError, ConfigError
from appliance.host import command

_LINE = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)(?P<rest>(?:\s+--hash=sha256:[0-9a-f]{64})+)$"
)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
# What the user told pip and the TLS library on this host; needed for this command only.
_KEPT = ("PIP_", "SSL_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "http_proxy", "https_proxy", "no_proxy",
         "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "XDG_CONFIG_HOME")  # fmt: skip
_LIMIT_S = 3600.0


class Pin(NamedTuple):
    """One line of a lock: a package, its version, and the hashes of acceptable files."""

    name: str
    version: str
    hashes: frozenset[str]


def parse_lock(file: Path) -> tuple[Pin, ...]:
    """Read a lock of exact versions with hashes.

    Raises:
        ConfigError: a line is anything else (an option, an address, a version without a hash).
    """
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    pins = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        found = _LINE.match(line)
        if found is None:
            raise ConfigError(
                f"{file}: entry {number}: found {line[:80]!r}; allowed: NAME==VERSION --hash=sha256:...",
                hint="make the lock anew, with hashes and without addresses",
            )
        pins.append(Pin(found["name"], found["version"], frozenset(_HASH.findall(found["rest"]))))
    if not pins:
        raise ConfigError(
            f"{file}: the lock is empty", hint="list the packages, or remove `lock` from the recipe"
        )
    return tuple(pins)


def platform_flags(python: str) -> list[str]:
    """Options that make any host's pip choose wheels for Debian 12, x86-64 and the image's Python."""
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)]
    flags = [f"--platform={t}" for t in (*tags, "manylinux2014_x86_64", "manylinux2010_x86_64",
                                         "manylinux1_x86_64", "linux_x86_64")]  # fmt: skip
    return [*flags, "--implementation=cp", f"--python-version={python}", f"--abi=cp{python.replace('.', '')}",
            "--abi=abi3", "--abi=none"]  # fmt: skip


def missing(folder: Path, pins: tuple[Pin, ...]) -> tuple[Pin, ...]:
    """The pins for which the folder holds no file with an accepted hash; files that match none are ignored."""
    present = {known_hash(f) for f in folder.glob("*.whl")}
    return tuple(p for p in pins if not p.hashes & present)


def known_hash(wheel: Path) -> str:
    """The wheel's hash, remembered beside it as long as size and time of change stay the same."""
    stat = wheel.stat()
    note = wheel.with_name(wheel.name + ".sha256")
    stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
    try:
        old_stamp, value = note.read_text(encoding="ascii").split()
        if old_stamp == stamp and re.fullmatch(r"[0-9a-f]{64}", value):
            return value
    except (OSError, ValueError):
        pass
    value = sha256_file(wheel)
    note.write_text(f"{stamp} {value}\n", encoding="ascii")
    return value


def fetch(
    lock: Path, folder: Path, scratch: Path, python: str, tell: Callable[[str, float | None], None]
) -> None:
    """Have every wheel of the lock in ``folder``; asks the registry only for what is missing.

    Raises:
        BuildError: the registry does not answer, or does not have what the lock names.
        ConfigError: the lock is not a lock.
    """
    pins = parse_lock(lock)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = missing(folder, pins)
    if not wanted:
        return
    part = scratch / "wheels"
    part.mkdir(exist_ok=True)
    request = scratch / "wanted.lock"
    request.write_text(
        "".join(
            f"{p.name}=={p.version} {' '.join(f'--hash=sha256:{h}' for h in sorted(p.hashes))}\n"
            for p in wanted
        ),
        encoding="ascii",
    )
    kept = {k: v for k, v in os.environ.items() if k.startswith(_KEPT)}
    call = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--require-hashes",
            "--only-binary=:all:", "--progress-bar=off", "--disable-pip-version-check", f"--dest={part}",
            f"--requirement={request}", *platform_flags(python)]  # fmt: skip
    log = scratch / "pip.log"
    with log.open("wb") as out:
        process = command.spawn(call, env=kept, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + _LIMIT_S
            while (rc := process.poll()) is None:
                if time.monotonic() > deadline:
                    raise BuildError("downloading Python packages took too long", hint="check the network")
                tell(f"{_count(log)} of {len(wanted)} packages", _count(log) / len(wanted))
                time.sleep(0.3)
        finally:
            command.end(process)
    said = log.read_text(encoding="utf-8", errors="replace")
    if rc != 0:
        raise BuildError(f"pip download failed\n{said.strip()[-2000:]}", hint=_hint(said), lock=str(lock))
    for wheel in part.glob("*.whl"):
        wheel.replace(folder / wheel.name)
    left = missing(folder, pins)
    if left:
        raise BuildError(f"pip did not bring {left[0].name} {left[0].version}", hint="see the lock")


def _count(log: Path) -> int:
    return log.read_text(encoding="utf-8", errors="replace").count("Collecting ")


def _hint(said: str) -> str:
    if "DO NOT MATCH THE HASHES" in said:
        return (
            "the registry serves another file of that version than the lock names (for torch: the CPU build is "
            "wanted; set pip's index-url or find-links on this host to a place that has it)"
        )
    if "No matching distribution" in said:
        return "the host's pip configuration leads to no registry that has it; check `pip config list`"
    return explain(said)
