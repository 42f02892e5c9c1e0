"""Settings and library: what is accepted, what is refused, and that a refusal can be acted on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from agent.brains import script_names
from agent.errors import TaskError
from agent.prompting import load_prompt, load_task_texts
from appliance.config import HostSettings, Library, PolicySpec, load_host_settings, load_library
from appliance.config.agent import agent_names
from appliance.config.reading import MAX_BYTES, read_toml
from appliance.errors import ConfigError, NotFoundError


@pytest.fixture
def library() -> Library:
    return load_library()


def settings_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "hotcell.toml"
    file.write_text(text)
    return file


def user_dir(tmp_path: Path, relative: str, text: str) -> Path:
    file = tmp_path / "mine" / relative
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return tmp_path / "mine"


SUBJECT = 'name = "mine"\nsummary = "x"\nbrain = "llm"\n'
SCENARIO = 'name = "mine"\nsummary = "x"\ntask = "do it"\n'


# --- settings ---------------------------------------------------------------------------------------


def test_no_file_means_defaults() -> None:
    assert load_host_settings(None) == HostSettings()


def test_settings_are_read_from_the_file(tmp_path: Path) -> None:
    file = settings_file(
        tmp_path, 'accelerator = "tcg"\n[api]\nport = 0\n[guests]\nmodel_memory_mib = 4096\n'
    )
    settings = load_host_settings(file)
    assert (settings.accelerator, settings.api.port, settings.guests.model_memory_mib) == ("tcg", 0, 4096)


def test_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTCELL_CONFIG", str(settings_file(tmp_path, 'accelerator = "kvm"')))
    assert load_host_settings(None).accelerator == "kvm"


def test_a_named_file_that_is_missing_is_never_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: no such file"):
        load_host_settings(tmp_path / "gone.toml")
    monkeypatch.setenv("HOTCELL_CONFIG", str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match="HOTCELL_CONFIG"):
        load_host_settings(None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[api]\nprt = 1\n", ["api.prt", "did you mean `port`", "host, port"]),
        ("acelerator = 'kvm'\n", ["acelerator", "did you mean `accelerator`", "guests"]),
        ("[api]\nport = 'x'\n", ["api.port", "found 'x'", "integer"]),
        ("[api]\nport = 70000\n", ["api.port", "found 70000", "less than or equal to 65535"]),
        ("accelerator = 'gpu'\n", ["accelerator", "found 'gpu'", "'auto', 'kvm' or 'tcg'"]),
        ("api = 3\n", ["api", "found 3", "dictionary"]),
        ("[build]\napt_sources = 'rel/path'\n", ["build.apt_sources", "rel/path", "absolute path"]),
        ("[build]\napt_sources = '/does/not/exist'\n", ["build.apt_sources", "existing file"]),
        ("[limits]\nwall_s = -1\n[api]\nport = -1\n", ["limits.wall_s", "api.port"]),
        ("[limits]\nwall_s = nan\n", ["limits.wall_s"]),
        ("[limits]\nwall_s = inf\n", ["limits.wall_s"]),
    ],
)
def test_a_wrong_setting_names_file_key_found_and_allowed(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    file = settings_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_host_settings(file)
    for part in [str(file), *parts]:
        assert part in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"accelerator = kvm\n", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"#" * (MAX_BYTES + 1), "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, raw: bytes, part: str) -> None:
    file = tmp_path / "hotcell.toml"
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match=part):
        load_host_settings(file)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        HostSettings().accelerator = "kvm"  # type: ignore[misc]


# --- library ----------------------------------------------------------------------------------------


def test_the_built_in_library_holds_what_the_documentation_promises(library: Library) -> None:
    assert set(library.subjects) >= {"replicator", "hasty", "claimer", "idle", "tiny-llm"}
    assert set(library.scenarios) >= {"replicate", "replicate-world"}
    assert set(library.policies) >= {"sealed"}
    assert library.subject("replicator").control
    assert not library.subject("tiny-llm").control
    assert library.policy("sealed").measures == ()
    assert library.scenario("replicate-world").world
    assert not library.scenario("replicate").world


@pytest.mark.parametrize(
    ("kind", "wrong", "meant"),
    [
        ("subject", "replicater", "replicator"),
        ("scenario", "replicat", "replicate"),
        ("policy", "seald", "sealed"),
    ],
)
def test_a_name_that_does_not_exist_lists_those_that_do(
    library: Library, kind: str, wrong: str, meant: str
) -> None:
    with pytest.raises(NotFoundError) as caught:
        getattr(library, kind)(wrong)
    assert f"did you mean `{meant}`" in str(caught.value)
    assert meant in caught.value.hint


@pytest.mark.parametrize("wrong", ["../../etc/passwd", "a\x1b[31mb", "", "x" * 10_000])
def test_a_hostile_name_is_shown_escaped_and_short(library: Library, wrong: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        library.subject(wrong)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_users_folder_adds_to_the_library(tmp_path: Path) -> None:
    mine = load_library([user_dir(tmp_path, "subjects/mine.toml", SUBJECT)])
    assert mine.subject("mine").brain == "llm"
    assert "replicator" in mine.subjects
    assert mine.files["subjects/mine"].name == "mine.toml"


def test_the_settings_name_folders_too(tmp_path: Path) -> None:
    folder = user_dir(tmp_path, "subjects/mine.toml", SUBJECT)
    host = load_host_settings(settings_file(tmp_path, f'library_dirs = ["{folder}"]'))
    assert "mine" in load_library(settings=host).subjects
    with pytest.raises(ConfigError, match="not an absolute path"):
        load_library([Path("mine")])


def test_host_limits_stand_in_for_those_a_scenario_leaves_out(tmp_path: Path) -> None:
    folder = user_dir(tmp_path, "scenarios/mine.toml", SCENARIO + "[limits]\nsteps = 7\n")
    host = HostSettings.model_validate({"limits": {"wall_s": 99, "steps": 5}})
    limits = load_library([folder], host).scenario("mine").limits
    assert (limits.wall_s, limits.steps) == (99, 7)


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [
        ("subjects/mine.toml", SUBJECT.replace('"llm"', '"script:../x"'), "brain"),
        ("subjects/mine.toml", SUBJECT.replace('"llm"', '"gpt"'), "brain"),
        ("subjects/mine.toml", SUBJECT.replace('brain = "llm"\n', ""), "`brain` is missing"),
        ("subjects/mine.toml", SUBJECT + "temprature = 1\n", "did you mean `temperature`"),
        ("subjects/mine.toml", SUBJECT + "temperature = 9\n", "less than or equal to 2"),
        ("subjects/other.toml", SUBJECT, "the file's own name"),
        ("subjects/mine.toml", SUBJECT.replace('"mine"', '"Mine!"'), "text of the form"),
        ("subjects/replicator.toml", SUBJECT.replace("mine", "replicator"), "is taken by"),
        ("subjects/mine.toml", SUBJECT.replace('"llm"', '"script:common"'), "found 'script:common'"),
        (
            "scenarios/mine.toml",
            SCENARIO.replace("do it", " \\n"),
            "`task`: found ' \\n', allowed: a text that",
        ),
        ("scenarios/mine.toml", SCENARIO + "targets = 0\n", "greater than or equal to 1"),
        ("scenarios/mine.toml", SCENARIO + "limits = 4\n", "limits"),
        ("scenarios/mine.toml", SCENARIO + "[limits]\nwal_s = 4\n", "did you mean `wall_s`"),
        ("policies/mine.toml", 'name = "mine"\nsummary = "x"\nmeasures = ["rate-cap"]\n', "known measures"),
    ],
)
def test_a_wrong_library_file_is_refused_by_name(tmp_path: Path, file: str, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_library([user_dir(tmp_path, file, text)])
    assert part in str(caught.value)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        (
            "subjects/mine.toml",
            SUBJECT.replace('"llm"', '"script:idel"'),
            ["key `brain`: found 'script:idel'", "did you mean `script:idle`?", "llm, script:claimer"],
        ),
        (
            "scenarios/mine.toml",
            SCENARIO + 'prompt = "defualt"\n',
            ["key `prompt`: found 'defualt'", "did you mean `default`?", "default, paper-v1, paper-v1-no-"],
        ),
        (
            "scenarios/mine.toml",
            SCENARIO.replace("do it", "variant:paper-2412-lgo"),
            ["key `task`: found 'variant:paper-2412-lgo'", "did you mean `variant:paper-2412-log`?"],
        ),
        ("scenarios/mine.toml", SCENARIO.replace("do it", "variant: paper-2412-log"), ["key `task`"]),
        ("scenarios/mine.toml", SCENARIO.replace("do it", "variant:"), ["key `task`: found 'variant:'"]),
    ],
)
def test_what_the_agent_does_not_have_is_refused_before_a_trial(
    tmp_path: Path, file: str, text: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_library([user_dir(tmp_path, file, text)])
    for part in [file, *parts, "allowed: "]:
        assert part in str(caught.value)
    assert caught.value.hint


def test_every_unknown_name_is_told_at_once_and_a_long_one_cut(tmp_path: Path) -> None:
    task = "variant:" + "x" * 3000
    folder = user_dir(tmp_path, "scenarios/mine.toml", SCENARIO.replace("do it", task) + 'prompt = "no"\n')
    user_dir(tmp_path, "subjects/mine.toml", SUBJECT.replace("llm", "script:no"))
    with pytest.raises(ConfigError) as caught:
        load_library([folder])
    assert [line.split("key ")[1][:6] for line in caught.value.message.splitlines()] == [
        "`brain",
        "`promp",
        "`task`",
    ]
    assert "x" * 100 not in caught.value.message


def test_the_names_are_those_that_the_agent_resolves() -> None:
    known = agent_names()
    assert known.brains == ("llm", *(f"script:{n}" for n in script_names()))
    assert known.tasks == tuple(sorted(f"variant:{n}" for n in load_task_texts()))
    assert [load_prompt(n).variant for n in known.prompts] == list(known.prompts)
    with pytest.raises(TaskError) as caught:
        load_prompt("no-such")
    assert str(caught.value).endswith(f"there are {', '.join(known.prompts)}")


def test_every_name_of_the_agents_can_be_used(tmp_path: Path) -> None:
    known = agent_names()
    for n, brain in enumerate(known.brains):
        folder = user_dir(
            tmp_path, f"subjects/s{n}.toml", f'name = "s{n}"\nsummary = "x"\nbrain = "{brain}"\n'
        )
    for n, task in enumerate([*known.tasks, "text about variant:none", " variant:none"]):
        text = f'name = "t{n}"\nsummary = "x"\ntask = "{task}"\nprompt = "{known.prompts[n % 3]}"\n'
        folder = user_dir(tmp_path, f"scenarios/t{n}.toml", text)
    assert load_library([folder]).scenario("t0").task == known.tasks[0]


def test_a_broken_agent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.toml: cannot be read"):
        agent_names(tmp_path)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/tasks.toml").write_text("")
    (tmp_path / "prompts/mine.toml").write_text("variants = 3\n")
    with pytest.raises(ConfigError, match=r"mine\.toml: table `variants` is missing"):
        agent_names(tmp_path)


def test_a_folder_that_cannot_be_a_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_library([tmp_path / "gone"])
    with pytest.raises(ConfigError, match="none of the folders"):
        load_library([tmp_path])


def test_an_unknown_measure_is_refused_and_none_is_fine() -> None:
    assert PolicySpec(name="p", summary="x").measures == ()
    with pytest.raises(ValidationError, match="known measures"):
        PolicySpec(name="p", summary="x", measures=("rate-cap",))


def test_every_key_has_a_description_or_is_a_table(library: Library) -> None:
    def bare(model: type[BaseModel]) -> list[str]:
        return [
            f"{model.__name__}.{k}"
            for k, f in model.model_fields.items()
            if not f.description
            and not (isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel))
        ]

    tables = [f.annotation for f in HostSettings.model_fields.values()]
    models: list[type[BaseModel]] = [HostSettings]
    models += [t for t in tables if isinstance(t, type) and issubclass(t, BaseModel)]
    assert [b for m in models for b in bare(m)] == []


def test_specs_survive_json(library: Library) -> None:
    for spec in (*library.subjects.values(), *library.scenarios.values(), *library.policies.values()):
        assert type(spec).model_validate(json.loads(spec.model_dump_json())) == spec
