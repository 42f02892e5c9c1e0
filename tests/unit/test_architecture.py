"""The shape of the code: imports point one way, every outside thing has one door, files stay small.

Each rule is a function from source text to violations, so that the rules themselves are tested too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("config", "host", "build", "cell", "contain", "trial", "evidence", "score", "store")
MAX_FILE = 400  # 300 is the aim
MAX_FUNCTION = 70  # 50 is the aim

# module -> the files that may import it, all others may not
DOORS = {
    "subprocess": ("appliance/host/command.py",),
    "psutil": ("appliance/host/capacity.py",),
    "ansible_runner": ("appliance/build/",),
    "libvirt": ("appliance/cell/libvirt_driver.py",),
    "libvirt_qemu": ("appliance/cell/libvirt_driver.py",),
    "pyroute2": ("appliance/cell/netlink.py",),
    "dissect": ("appliance/evidence/",),
    # the warden reads the ledger by itself: it must work when everything else hangs
    "sqlite3": ("appliance/cell/ledger.py", "appliance/cell/warden.py", "appliance/store/"),
    "sqlite_utils": ("appliance/store/",),
    "nicegui": ("api/",),
    "fastapi": ("api/",),
    "uvicorn": ("api/", "appliance/cli"),
    "typer": ("appliance/cli",),
}
CALLS = {  # attribute call -> the files that may make it
    "os.system": (),
    "os.popen": (),
    # the two other entries are programs of their own, started as child processes
    "sys.exit": ("appliance/cli", "appliance/cell/warden.py", "appliance/evidence/disk_worker.py"),
}


def sources(*roots: str) -> list[Path]:
    return sorted(p for r in roots for p in (ROOT / r).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also those in functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "(relative)"
            elif node.module in ("appliance", "api"):
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def rank(module: str) -> int:
    """Place on the line of stages; a module may import what has its own rank or a lower one."""
    parts = module.split(".")
    if parts[0] == "api":
        return len(STAGES) + 3
    name = parts[1] if len(parts) > 1 else ""
    if name in ("", "errors", "model"):
        return {"": 0, "errors": 0, "model": 1}[name]
    if name in STAGES:
        return 2 + STAGES.index(name)
    # what is left is the service: its protocol, and the pipeline that implements it
    return len(STAGES) + 4 if name.startswith("cli") else len(STAGES) + 2


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def order_violations(file: str, text: str) -> list[str]:
    mine = rank(module_of(file))
    found = []
    for line, name in imports(ast.parse(text)):
        if name == "(relative)":
            found.append(f"{file}:{line}: relative import; name the stage")
        elif name.split(".")[0] in ("appliance", "api") and rank(name) > mine:
            found.append(f"{file}:{line}: imports {name}, which comes later than {module_of(file)}")
        elif name.split(".")[0] == "agent":
            found.append(f"{file}:{line}: imports {name}, which runs in the guest")
    return found


def door_violations(file: str, text: str) -> list[str]:
    tree = ast.parse(text)
    found = [
        f"{file}:{line}: imports {name}; only {', '.join(DOORS[top])} may"
        for line, name in imports(tree)
        if (top := name.split(".")[0]) in DOORS and not file.startswith(DOORS[top])
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = ast.unparse(node.func)
            if called in CALLS and not (CALLS[called] and file.startswith(CALLS[called])):
                found.append(f"{file}:{node.lineno}: calls {called}")
    return found


def size_violations(file: str, text: str) -> list[str]:
    lines = text.count("\n")
    found = [f"{file}: {lines} lines, at most {MAX_FILE}"] if lines > MAX_FILE else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                found.append(f"{file}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
    return found


def all_violations(rule: str, files: list[Path]) -> list[str]:
    check = {"order": order_violations, "door": door_violations, "size": size_violations}[rule]
    return [v for f in files for v in check(relative(f), f.read_text(encoding="utf-8"))]


def none_of(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


def test_imports_point_only_backwards() -> None:
    none_of(all_violations("order", sources("appliance", "api")))


def test_every_outside_thing_has_one_door() -> None:
    none_of(all_violations("door", sources("appliance", "api")))


def test_files_and_functions_stay_small() -> None:
    none_of(all_violations("size", sources("appliance", "api", "agent")))


def test_the_agent_stands_alone() -> None:
    allowed = {*sys.stdlib_module_names, "agent"}
    strangers = [
        f"{relative(f)}:{line}: imports {name}"
        for f in sources("agent")
        for line, name in imports(ast.parse(f.read_text(encoding="utf-8")))
        if name != "(relative)" and name.split(".")[0] not in allowed
    ]
    none_of(strangers)


def test_every_folder_of_the_package_is_a_stage() -> None:
    folders = {p.name for p in (ROOT / "appliance").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders == {*STAGES, "service", "pipeline", "cli"}


def test_ansible_is_no_python_package() -> None:
    # with an __init__.py, "import ansible" would find our folder in the place of Ansible
    assert list((ROOT / "ansible").rglob("__init__.py")) == []


def tracked_text() -> Iterator[tuple[str, str]]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in names.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and not path.is_symlink():
            raw = path.read_bytes()
            if b"\0" not in raw:
                yield name, raw.decode("utf-8", errors="replace")


REGISTRY = re.compile(
    r"(deb|ftp|security|snapshot)\.[a-z.]*debian\.org|pypi\.(org|python\.org)|pythonhosted\.org"
    r"|download\.pytorch\.org|registry\.npmjs\.org|huggingface\.co|archive\.ubuntu\.com"
)


def test_no_registry_is_hard_coded() -> None:
    assert [n for n, text in tracked_text() if REGISTRY.search(text)] == []


# --- the rules themselves can fail ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("appliance/host/x.py", "from appliance.cell.qga import Qga"),
        ("appliance/host/x.py", "import appliance.store"),
        ("appliance/host/x.py", "from appliance import cell"),
        ("appliance/trial/x.py", "def f():\n    from appliance.evidence.journal import Journal"),
        ("appliance/errors.py", "from appliance.model import Name"),
        ("appliance/store/x.py", "from appliance.cli import main"),
        ("appliance/pipeline/lab.py", "from appliance.cli import main"),
        ("appliance/pipeline/lab.py", "from api.app import make"),
        ("api/app.py", "from appliance.cli.common import out"),
        ("appliance/cell/x.py", "from agent.loop import run"),
        ("appliance/cell/x.py", "from .qga import Qga"),
    ],
)
def test_the_order_rule_refuses(file: str, text: str) -> None:
    assert order_violations(file, text)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("appliance/host/x.py", "from appliance.config import HostSettings"),
        ("appliance/score/x.py", "from appliance.trial.records import Probe"),
        ("appliance/cli/app.py", "from appliance.pipeline import run\nfrom api.app import make"),
        ("api/x.py", "from appliance.service import Service"),
    ],
)
def test_the_order_rule_allows(file: str, text: str) -> None:
    assert order_violations(file, text) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("appliance/cell/x.py", "import subprocess"),
        ("appliance/cell/x.py", "from libvirt import open"),
        ("appliance/evidence/x.py", "import sqlite3"),
        ("appliance/trial/x.py", "import psutil"),
        ("appliance/cell/x.py", "import os\nos.system('x')"),
        ("appliance/store/x.py", "import sys\nsys.exit(1)"),
    ],
)
def test_the_door_rule_refuses(file: str, text: str) -> None:
    assert door_violations(file, text)


def test_the_size_rule_refuses() -> None:
    assert size_violations("x.py", "#\n" * (MAX_FILE + 1))
    assert size_violations("x.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION)


def test_the_registry_rule_refuses() -> None:
    assert REGISTRY.search("http://deb." + "debian.org/debian")
    assert REGISTRY.search("https://pypi." + "org/simple")
