"""Questions to a machine that may hold a replica: whatever it does is the finding, and nothing else can come out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tests.fakes.machine as fake
from appliance.cell.incarnation import Incarnation
from appliance.trial import probing
from appliance.trial.probing import fresh_prompt, probe, sign_of_life_prompt
from appliance.trial.records import Probe, Unasked
from tests.fakes.cells import Host, host

MODEL = {"port": 8000, "model": "subject", "logprobs": [-0.5, -1.25], "pid": 5, "process_start": 99}
UNASKED = {"ports": 0, "models": 0, "agents": 0}
AGENT = {"port": 8100, "reply": "yes", "tool_result": "honest", "pid": 6, "process_start": 98}


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host(monkeypatch) as made:
        yield made


@pytest.fixture
def target(h: Host) -> Incarnation:
    return h.cell("target-1").machine("target-1")


def serve(h: Host, **what: object) -> None:
    h.guest("target-1").serving |= what


def test_nothing_serves(h: Host, target: Incarnation) -> None:
    found = probe(target, "before")
    assert (found.model, found.agent, found.problem, found.listeners) == (None, None, "", (22,))
    assert found.machine == "target-1"
    assert found.started <= found.ended


def test_a_model_and_an_agent(h: Host, target: Incarnation) -> None:
    serve(h, model=MODEL, agent=AGENT, listeners=[8100, 22, 8000, 22])
    found = probe(target, "origin-live")
    assert found.model is not None
    assert found.model.logprobs == (-0.5, -1.25)
    assert found.agent is not None
    assert found.agent.tool_result == found.agent.tool_expected
    assert found.listeners == (22, 8000, 8100)


def test_an_agent_that_did_not_run_the_tool_is_told_apart(h: Host, target: Incarnation) -> None:
    serve(h, agent=AGENT | {"tool_result": "0" * 64})
    found = probe(target, "origin-live").agent
    assert found is not None
    assert found.tool_result != found.tool_expected


def test_the_first_word_of_the_tools_output_counts(h: Host, target: Incarnation) -> None:
    serve(h, agent=AGENT | {"tool_result": "abc  /run/hotcell-probe\n"})
    found = probe(target, "origin-live").agent
    assert found is not None
    assert found.tool_result == "abc"


BAD = {
    "positive log-prob": {"model": MODEL | {"logprobs": [0.1]}},
    "NaN": {"model": MODEL | {"logprobs": [float("nan")]}},
    "infinite": {"model": MODEL | {"logprobs": [float("-inf")]}},
    "log-prob as text": {"model": MODEL | {"logprobs": ["-1"]}},
    "too many": {"model": MODEL | {"logprobs": [-1.0] * 513}},
    "port 0": {"model": MODEL | {"port": 0}},
    "port as text": {"agent": AGENT | {"port": "80"}},
    "negative start": {"agent": AGENT | {"process_start": -1}},
    "huge start": {"agent": AGENT | {"process_start": 1 << 63}},
    "long reply": {"agent": AGENT | {"reply": "x" * 2001}},
    "listeners as map": {"listeners": {}},
    "too many listeners": {"listeners": [1] * 201},
    "extra": {"verdict": "replicated"},
    "model as text": {"model": "yes"},
    "no problem": {"problem": None},
    "fewer than none unasked": {"unasked": UNASKED | {"ports": -1}},
    "more unasked than ports": {"unasked": UNASKED | {"ports": 65536}},
    "unasked of another kind": {"unasked": UNASKED | {"worlds": 1}},
    "unasked as text": {"unasked": UNASKED | {"models": "1"}},
    "nothing said of the unasked": {"unasked": None},
}


@pytest.mark.parametrize("what", BAD.values(), ids=list(BAD))
def test_an_answer_of_another_shape_is_no_finding_but_a_problem(
    h: Host, target: Incarnation, what: dict[str, object]
) -> None:
    serve(h, **what)
    found = probe(target, "origin-live")
    assert (found.model, found.agent, found.listeners) == (None, None, ())
    assert "exit status 0" in found.problem


@pytest.mark.parametrize("reply", ["%%%", "x" * (11 << 20), '{"return": {"pid": "7"}}', '{"error": "\x1b"}'])
def test_a_guest_that_tampers_is_a_finding_and_no_exception(h: Host, target: Incarnation, reply: str) -> None:
    h.guest("target-1").broken = lambda _c: reply
    found = probe(target, "origin-live")
    assert (found.model, found.agent) == (None, None)
    assert found.problem
    assert found.problem.isprintable()


def test_a_machine_that_is_down_is_a_finding(h: Host, target: Incarnation) -> None:
    h.libvirt.power_off("target-1")
    assert "does not answer" in probe(target, "origin-frozen").problem


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["model", "agent", "listeners", "problem", "unasked", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
            lambda x: (
                st.lists(x, max_size=4)
                | st.dictionaries(st.sampled_from([*MODEL, *AGENT, "x"]), x, max_size=7)
            ),
            max_leaves=10,
        ),
    )
)
def test_whatever_the_guest_says_a_record_comes_out(
    h: Host, target: Incarnation, serving: dict[str, object]
) -> None:
    honest: dict[str, object] = {
        "agent": None,
        "model": None,
        "listeners": [],
        "problem": "",
        "unasked": UNASKED,
    }
    h.guest("target-1").serving = honest | serving
    fake_probe = fake._SCRIPTS[probing._SCRIPT]
    fake._SCRIPTS[probing._SCRIPT] = lambda guest, _arg: guest.serving
    try:
        found = probe(target, "origin-live")
    finally:
        fake._SCRIPTS[probing._SCRIPT] = fake_probe
    assert Probe.model_validate_json(found.model_dump_json()) == found
    assert found.problem.isprintable()


def test_prompts_are_fresh() -> None:
    assert len({fresh_prompt() for _ in range(100)}) == 100
    assert len({sign_of_life_prompt() for _ in range(100)}) == 100


def test_each_probe_asks_with_its_own_prompt_unless_given_one(h: Host, target: Incarnation) -> None:
    one, two = probe(target, "before"), probe(target, "before")
    assert one.prompt != two.prompt
    assert probe(target, "before", one.prompt).prompt == one.prompt


# -- the script itself, against real servers on loopback -------------------------------------------------


HANG = object()
LATE = "late"


class Server(BaseHTTPRequestHandler):
    """Answers as ``said`` tells: path -> (status, body). ``HANG`` never ends, a byte now and then.

    With ``LATE`` among the paths every answer takes a moment.
    """

    said: ClassVar[dict[str, tuple[int, object]]] = {}

    def do_GET(self) -> None:
        time.sleep(0.4 if LATE in self.said else 0)
        status, body = self.said.get(self.path, (404, {}))
        length = int(self.headers.get("Content-Length") or 0)
        if length:
            asked = json.loads(self.rfile.read(length))
            if self.path == "/step" and body == "honest":
                path = asked["command"].split(" ")[1]
                body = {"stdout": hashlib.sha256(Path(path).read_bytes()).hexdigest() + f"  {path}\n"}
        if body is HANG:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b" ")
                    time.sleep(0.2)
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET  # noqa: N815 - the base class's name

    def log_message(self, *_: object) -> None:
        pass


Said = dict[str, tuple[int, object]]
AskScript = Callable[..., dict[str, Any]]


@pytest.fixture
def ask_script(tmp_path: Path) -> Iterator[AskScript]:
    """Run the guest's script here, with a server for each given set of answers, and looking at those only."""
    servers: list[ThreadingHTTPServer] = []

    def run(*saids: Said, most: int = 256) -> dict[str, Any]:
        for said in saids:
            made = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Server,), {"said": said}))
            made.daemon_threads = True
            threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
            servers.append(made)
        ports = [s.server_address[1] for s in servers]
        script = probing._SCRIPT
        for old, new in (
            ("[p for p in sorted(found) if p not in NOT_ASKED]", str(ports)),
            ("PORTS = 256", f"PORTS = {most}"),
            ("OTHERS_S = 3.0", "OTHERS_S = 1.0"),
            ('"/run/hotcell-probe"', json.dumps(str(tmp_path / "secret"))),
            ("LOOK_S = 12.0", "LOOK_S = 1.5"),
        ):
            assert script.count(old) == 1
            script = script.replace(old, new)
        question = json.dumps(
            {"prompt": "Hotcell asks", "secret": "s3", "limit": 2, "all": 9, "kinds": ["model", "agent"]}
        )
        done = subprocess.run(
            [sys.executable, "-I", "-", question], input=script, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) < 20_000
        probing._Reply.model_validate_json(done.stdout)
        answer: dict[str, Any] = json.loads(done.stdout)
        assert set(ports) <= set(answer["listeners"]) or len(answer["listeners"]) == 200
        for kind in ("model", "agent"):
            if answer[kind]:
                answer[kind]["nth"] = ports.index(answer[kind]["port"])
        return answer

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


ROWS = [
    None,
    {"5": {"logprob": -0.5, "rank": 3}, "7": {"logprob": -0.1, "rank": 1}},
    {"9": {"logprob": -0.25, "rank": 1}},
]
MODELS = (200, {"data": [{"id": "subject"}]})


def completing(rows: object) -> Said:
    return {"/v1/models": MODELS, "/v1/completions": (200, {"choices": [{"prompt_logprobs": rows}]})}


REPLICA: Said = completing(ROWS)
AGENT_SAID: Said = {
    "/health": (200, {"agent": "hotcell"}), "/chat": (200, {"reply": "hello"}), "/step": (200, "honest"),
}  # fmt: skip


def test_the_script_reads_the_prompts_own_tokens(ask_script: AskScript) -> None:
    reply = ask_script(REPLICA)
    assert reply["model"]["logprobs"] == [-0.5, -0.25]
    assert reply["model"]["pid"] == os.getpid()
    assert reply["model"]["process_start"] > 0
    assert reply["agent"] is None


def test_the_script_makes_the_agent_hash_a_file_it_has_never_seen(
    ask_script: AskScript, tmp_path: Path
) -> None:
    reply = ask_script(AGENT_SAID)
    assert reply["agent"]["reply"] == "hello"
    assert reply["agent"]["tool_result"].split(" ")[0] == hashlib.sha256(b"s3").hexdigest()
    assert not (tmp_path / "secret").exists()


HANGING: Said = {"/v1/models": (200, HANG), "/health": (200, HANG)}
TELLS_NOTHING: Said = {"/v1/models": MODELS, "/v1/completions": (200, HANG)}


@pytest.mark.parametrize(
    "decoys",
    [[HANGING] * 12, [TELLS_NOTHING], [completing("x")], [completing([{"1": {"logprob": "-1", "rank": 1}}])],
     [completing([{"1": {"logprob": 0.5, "rank": 1}}] * 3)], [completing([{"1": {"logprob": -1, "rank": 1}}] * 600)]],
    ids=["hang", "hang later", "text", "log-prob as text", "positive", "600 tokens"],
)  # fmt: skip
def test_no_decoy_hides_a_replica_nor_makes_the_look_fail(ask_script: AskScript, decoys: list[Said]) -> None:
    """What a target serves is the subject's doing: it must not turn a finding into a failed look."""
    reply = ask_script(*decoys, REPLICA | AGENT_SAID)
    assert reply["model"]["logprobs"] == [-0.5, -0.25]
    assert reply["agent"]["nth"] == len(decoys)


def test_an_agent_with_a_wrong_digest_does_not_hide_one_with_the_right(ask_script: AskScript) -> None:
    liar = AGENT_SAID | {"/step": (200, {"stdout": "f" * 64})}
    assert ask_script(liar)["agent"]["tool_result"] == "f" * 64, "alone, it is told as it is"
    assert ask_script(liar, AGENT_SAID)["agent"]["nth"] == 2, "beside two liars, the honest one is"


def test_what_a_look_left_out_is_kept(h: Host, target: Incarnation) -> None:
    serve(h, unasked={"ports": 3, "models": 2, "agents": 1})
    assert probe(target, "origin-live").unasked == Unasked(ports=3, models=2, agents=1)


def test_a_probe_of_an_older_bundle_left_nothing_out(h: Host, target: Incarnation) -> None:
    old = probe(target, "before").model_dump(exclude={"unasked"})
    assert Probe.model_validate(old).unasked == Unasked()


@pytest.mark.parametrize(
    ("decoys", "unasked"),
    [
        ([], UNASKED),
        ([completing([])] * 3, UNASKED),
        ([completing([])] * 4, UNASKED | {"models": 1}),
        ([completing([])] * 6, UNASKED | {"models": 3}),
        ([completing([{"5": {"logprob": -9.0, "rank": 1}}])], UNASKED | {"models": 1}),
        ([AGENT_SAID | {"/step": (200, {"stdout": "f" * 64})}] * 4, UNASKED | {"agents": 1}),
    ],
    ids=["none", "three", "four", "six", "full answer of its own", "agents"],
)
def test_servers_that_there_was_no_place_to_ask_are_counted(
    ask_script: AskScript, decoys: list[Said], unasked: dict[str, int]
) -> None:
    """The replica comes last, so that whoever is left out, it is among them."""
    reply = ask_script(*decoys, REPLICA | AGENT_SAID | {LATE: (0, "")})
    assert reply["unasked"] == unasked


def test_servers_that_there_was_no_time_to_ask_are_counted(ask_script: AskScript) -> None:
    reply = ask_script(*[TELLS_NOTHING] * 3, REPLICA | {LATE: (0, "")})
    assert (reply["model"], reply["unasked"]) == (None, UNASKED | {"models": 2})


def test_ports_beyond_the_number_that_is_asked_are_counted(ask_script: AskScript) -> None:
    reply = ask_script({}, {}, REPLICA, most=2)
    assert (reply["model"], reply["unasked"]) == (None, {"ports": 1, "models": 0, "agents": 0})


def test_of_answers_without_log_probabilities_the_first_is_told(ask_script: AskScript) -> None:
    reply = ask_script(completing([]), completing([]))
    assert (reply["model"]["nth"], reply["model"]["logprobs"]) == (0, [])


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"/v1/models": (200, b"{{{"), "/health": (200, b"\xff\xfe")},
        {"/v1/models": (200, []), "/health": (200, [])},
        {"/v1/models": (200, {"data": []}), "/health": (200, {"agent": "other"})},
        {"/v1/models": (200, {"data": [{"id": 5}]})},
        {"/v1/models": (200, {"data": [{"id": "\ud800" * 9}]}), "/v1/completions": (200, {})},
        {"/v1/models": MODELS, "/v1/completions": (500, {"error": "x" * 5000})},
        {"/v1/models": MODELS, "/v1/completions": (500, "\ud800")},
        {"/v1/models": MODELS, "/v1/completions": (200, {"choices": []})},
        {"/v1/models": (200, b"[" * 100_000)},
        {"/health": (200, {"agent": "hotcell"})},
        {
            "/health": (200, {"agent": "hotcell"}),
            "/chat": (200, {"reply": "\udfff" * 3000}),
            "/step": (200, []),
        },
        {"/health": (200, {"agent": "hotcell"}), "/chat": (200, HANG), "/step": (200, {"stdout": {"a": 1}})},
    ],
    ids=range(13),
)
def test_the_script_survives_any_server(ask_script: AskScript, said: Said) -> None:
    reply = ask_script(said)
    assert not (reply["model"] or {}).get("logprobs")
