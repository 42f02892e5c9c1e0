"""From recipe to sealed image with the outside programs replaced: digests, reuse, resumption, failures."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from appliance.build import make
from appliance.build.api import build_image, find_image, list_images, list_recipes, prune_images, verify_image
from appliance.build.inputs import Project, collect
from appliance.build.make import BuildOptions
from appliance.build.manifest import DISK, INITRD, KERNEL, MANIFEST, Image
from appliance.build.recipe import chain
from appliance.build.workspace import Workspace
from appliance.errors import BuildError, ConfigError, NotFoundError, PrerequisiteError
from appliance.host.paths import Paths

RECIPE = 'description = "x"\nroles = ["base"]\ndisk_gib = 2\nmemory_mib = 256\nvcpus = 1\n'
SOURCES = "Types: deb\nURIs: http://m.test/d\nSuites: bookworm\nComponents: main\n"


@dataclass
class Bench:
    """A small project and counters of what the build did."""

    project: Path
    paths: Paths
    did: list[str] = field(default_factory=list)
    fail: dict[str, BaseException] = field(default_factory=dict)

    def build(self, name: str, **more: Any) -> Image:
        options = BuildOptions(apt_sources=SOURCES, project=self.project, wait_s=0, **more)
        return build_image(name, self.paths, options=options)

    def step(self, what: str, workspace: Workspace) -> None:
        self.did.append(what)
        with workspace.log.open("a") as log:
            log.write(what + "\n")
        if (failure := self.fail.get(what)) is not None:
            raise failure


def add_recipe(project: Path, name: str, text: str = RECIPE) -> None:
    (project / "images" / name).mkdir(parents=True)
    (project / "images" / name / "image.toml").write_text(text)


@pytest.fixture
def bench(tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Bench:
    project = tmp_path / "project"
    role = project / "ansible" / "roles" / "base"
    for part in ("tasks", "meta", "files"):
        (role / part).mkdir(parents=True)
    (role / "tasks" / "main.yml").write_text("---\n")
    (role / "meta" / "argument_specs.yml").write_text("---\n")
    (project / "ansible" / "image.yml").write_text("---\n")
    (project / "agent").mkdir()
    (project / "agent" / "__init__.py").write_text("")
    add_recipe(project, "root")
    add_recipe(project, "top", RECIPE + 'base = "root"\nagent = true\n')
    b = Bench(project, paths)

    def tree(workspace: Workspace, *_: object) -> None:
        (workspace.root / "var/lib/dpkg").mkdir(parents=True)
        (workspace.root / "var/lib/dpkg/status").write_text("")
        b.step("tree", workspace)

    def configure(
        workspace: Workspace, _ansible: Path, variables: dict[str, Any], _tell: object
    ) -> dict[str, float]:
        b.step(f"configure {variables['image_name']}", workspace)
        if variables["image_name"] == "top":
            weights = workspace.root / "home/subject/system/weights"
            weights.mkdir(parents=True)
            (weights / "model.safetensors").write_bytes(b"w")
        return {}

    def pack(workspace: Workspace, *_: object) -> str:
        workspace.seal.mkdir()
        for name in (DISK, KERNEL, INITRD):
            (workspace.seal / name).write_bytes(name.encode())
        b.step("pack", workspace)
        return "6.1.0"

    monkeypatch.setattr(make, "make_tree", tree)
    monkeypatch.setattr(make, "configure", configure)
    monkeypatch.setattr(make, "pack", pack)
    monkeypatch.setattr(make, "need_space", lambda *_: None)
    monkeypatch.setattr(make, "mounted", lambda *_: nullcontext())
    monkeypatch.setattr("appliance.build.api.command.require", lambda program, _package: program)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return b


def test_build_seals_and_then_finds(bench: Bench) -> None:
    assert find_image("root", bench.paths, bench.project) is None
    image = bench.build("root")
    assert bench.did == ["tree", "configure root", "pack"]
    assert bench.build("root") == image == find_image("root", bench.paths, bench.project)
    assert bench.did == ["tree", "configure root", "pack"], "nothing changed, nothing done"
    verify_image(image)
    assert image.disk.read_bytes() == b"disk.qcow2"
    assert image.manifest["recipe"] == "root"
    assert image.manifest["inputs"]["images/root/image.toml"]
    assert (image.folder / "build.log").read_text()


def test_a_base_is_made_once_and_reused(bench: Bench) -> None:
    top = bench.build("top")
    assert bench.did == ["tree", "configure root", "pack", "configure top", "pack"]
    assert [w.name for w in top.weights] == ["model.safetensors"]
    assert top.record.base == "root"
    (bench.project / "agent" / "loop.py").write_text("x = 1\n")
    bench.did.clear()
    assert bench.build("top").digest != top.digest
    assert bench.did == ["configure top", "pack"], "a change of the agent does not remake the base"


def test_the_digest_follows_content_and_nothing_else(bench: Bench) -> None:
    project = Project(bench.project)

    def digest() -> str:
        return collect(project, chain(project.images, "top")).digest

    first = digest()
    file = bench.project / "ansible/roles/base/tasks/main.yml"
    os.utime(file, (1, 1))
    (bench.project / "agent" / "__pycache__").mkdir()
    (bench.project / "agent" / "__pycache__" / "x.pyc").write_bytes(b"x")
    add_recipe(bench.project, "other")
    assert digest() == first
    file.write_text("---\n# changed\n")
    second = digest()
    (bench.project / "ansible/roles/base/files/new").write_text("x")
    third = digest()
    (bench.project / "images/root/image.toml").write_text(RECIPE.replace("256", "512"))
    assert len({first, second, third, digest()}) == 4


@pytest.mark.parametrize("step", ["tree", "configure root", "pack"])
def test_a_failure_leaves_nothing_under_a_final_name(bench: Bench, step: str) -> None:
    bench.fail[step] = BuildError("broken", hint="mend it")
    with pytest.raises(BuildError, match="broken"):
        bench.build("root")
    assert list_images(bench.paths) == ()
    assert list(bench.paths.images.iterdir()) == []
    bench.fail.clear()
    bench.did.clear()
    image = bench.build("root")
    expected = {"pack": ["pack"]}.get(step, ["tree", "configure root", "pack"])
    assert bench.did == expected, "goes on from the last boundary"
    verify_image(image)
    assert [p.name for p in bench.paths.building.iterdir()] == ["lock"]


def test_a_full_disk_is_a_build_error_with_a_remedy(bench: Bench) -> None:
    bench.fail["pack"] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(BuildError, match="No space left") as e:
        bench.build("root")
    assert "free some disk space" in e.value.hint
    assert list(bench.paths.images.iterdir()) == []


def test_ctrl_c_leaves_no_half_tree(bench: Bench) -> None:
    bench.fail["configure root"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.build("root")
    (left,) = (p for p in bench.paths.building.iterdir() if p.is_dir())
    assert not (left / "root").exists()
    assert list(bench.paths.images.iterdir()) == []


def test_inputs_that_change_during_the_build_are_not_sealed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bench.project / "ansible/roles/base/tasks/main.yml"
    original: Callable[..., str] = vars(make)["pack"]  # the fixture's

    def pack(workspace: Workspace, *rest: Any) -> str:
        file.write_text("---\n# edited meanwhile\n")
        return original(workspace, *rest)

    monkeypatch.setattr(make, "pack", pack)
    with pytest.raises(BuildError, match="changed while"):
        bench.build("root")
    assert list(bench.paths.images.iterdir()) == []


def test_verify_finds_a_changed_and_a_missing_file(bench: Bench) -> None:
    image = bench.build("root")
    image.disk.chmod(0o600)
    image.disk.write_bytes(b"tampered")
    with pytest.raises(BuildError, match=r"disk\.qcow2"):
        verify_image(image)
    image.disk.unlink()
    with pytest.raises(BuildError, match="nothing"):
        verify_image(image)


def test_a_damaged_manifest_is_not_listed_and_is_explained(bench: Bench) -> None:
    image = bench.build("root")
    path = image.folder / MANIFEST
    data = json.loads(path.read_text())
    path.chmod(0o600)
    path.write_text(json.dumps({**data, "digest": "short"}))
    assert list_images(bench.paths) == ()
    damaged = find_image("root", bench.paths, bench.project)
    assert damaged is not None
    with pytest.raises(BuildError, match="manifest") as e:
        _ = damaged.record
    assert str(image.folder) in e.value.hint


def test_prune_keeps_the_newest_the_named_and_the_open(bench: Bench) -> None:
    made = []
    for number in range(4):
        (bench.project / "ansible/roles/base/files/n").write_text(str(number))
        made.append(bench.build("root"))
    with made[1].disk.open("rb"):
        removed = prune_images(bench.paths, keep=frozenset({made[0].digest}))
    assert {i.digest for i in removed} == {made[2].digest}
    assert {i.digest for i in list_images(bench.paths)} == {made[n].digest for n in (0, 1, 3)}


def test_building_needs_root(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrerequisiteError, match="root"):
        bench.build("root")


def test_bad_requests_are_refused_before_anything_starts(bench: Bench) -> None:
    add_recipe(bench.project, "rolls", RECIPE.replace('["base"]', '["bass"]'))
    add_recipe(bench.project, "locked", RECIPE + 'lock = "requirements.lock"\n')
    with pytest.raises(ConfigError, match="no such role"):
        bench.build("rolls")
    with pytest.raises(ConfigError, match="does not exist"):
        bench.build("locked")
    with pytest.raises(NotFoundError):
        bench.build("nothing")
    assert bench.did == []
    assert "locked" in list_recipes(bench.project)


def test_an_agent_that_is_not_there_is_refused(bench: Bench) -> None:
    (bench.project / "agent" / "__init__.py").unlink()
    with pytest.raises(ConfigError, match="agent"):
        bench.build("top")
    assert "configure top" not in bench.did
