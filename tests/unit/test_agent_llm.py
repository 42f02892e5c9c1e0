"""The model client against a real small server: what it sends, what it accepts, and its bounds."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from agent.errors import ModelError
from agent.llm import MAX_ANSWER, Message, ModelClient
from tests.unit.agent_stubs import completion, model_server

HELLO: list[Message] = [{"role": "user", "content": "hello"}]


def ask(client: ModelClient, **more: float) -> str:
    return client.chat(HELLO, max_tokens=5, temperature=0.25, seed=9, within_s=more.get("within_s")).text


@contextmanager
def raw_server(*chunks: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """Says what it is told to, whatever is asked, and hangs up; a pause between chunks."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(2)
                try:
                    connection.recv(65536)
                    for chunk in chunks:
                        connection.sendall(chunk)
                        if stop.wait(pause_s):
                            return
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        stop.set()
        thread.join()
        listener.close()


def test_a_completion_is_asked_for_and_read() -> None:
    with model_server(lambda _: (200, completion("hi é", 11))) as server:
        answer = ModelClient(server.url).chat(HELLO, max_tokens=5, temperature=0.25, seed=9)
    assert (answer.text, answer.model, answer.prompt_tokens, answer.completion_tokens, answer.stopped) == (
        "hi é", "subject", 11, 3, "stop",
    )  # fmt: skip
    assert server.asked == [
        {"model": "subject", "messages": HELLO, "max_tokens": 5, "temperature": 0.25, "seed": 9}
    ]


def test_the_model_is_asked_for_once_and_its_context_kept() -> None:
    with model_server(lambda _: (200, completion("x"))) as server:
        client = ModelClient(server.url + "/")
        assert client.model().context == 2048
        server.models = (500, b"")
        assert client.model().name == "subject"


def test_an_empty_answer_is_an_answer() -> None:
    with model_server(lambda _: (200, completion(None))) as server:
        assert ask(ModelClient(server.url)) == ""


@pytest.mark.parametrize(
    ("status", "body", "kept"),
    [
        (400, b'{"message": "maximum context length"}', 400),
        (500, b"\xff\x1b[2J", 500),
        (302, b"", 302),
        (200, b"not json", 0),
        (200, b"[]", 0),
        (200, b"[" * 100_000, 0),
        (200, json.dumps({"choices": [{"message": {"content": 5}}]}).encode(), 0),
        (200, b"x" * (MAX_ANSWER + 10), 0),
    ],
)
def test_a_bad_answer_is_a_model_error_in_printable_words(status: int, body: bytes, kept: int) -> None:
    with model_server(lambda _: (status, body)) as server, pytest.raises(ModelError) as caught:
        ask(ModelClient(server.url))
    assert caught.value.status == kept
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "models",
    [b"{}", b'{"data": []}', b'{"data": [{"id": 3}]}', b'{"data": [{"id": "m", "max_model_len": "9"}]}'],
)
def test_a_server_that_lists_no_usable_model(models: bytes) -> None:
    with (
        model_server(lambda _: (200, b""), (200, models)) as server,
        pytest.raises(ModelError, match="model"),
    ):
        ModelClient(server.url).model()


def test_no_server_at_all() -> None:
    with pytest.raises(ModelError, match="no answer"):
        ModelClient("http://127.0.0.1:9/v1").model()


def test_the_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with model_server(lambda _: (200, completion("direct"))) as server:
        assert ask(ModelClient(server.url)) == "direct"


@pytest.mark.parametrize("chunks", [(b"",), (b"HTTP/1.1 200",), (b"\x00\xff\r\n\r\n",)])
def test_a_server_that_speaks_no_http(chunks: tuple[bytes, ...]) -> None:
    with raw_server(*chunks) as url, pytest.raises(ModelError):
        ModelClient(url, timeout_s=2).model()


def test_a_server_that_never_answers_costs_the_timeout() -> None:
    begun = time.monotonic()
    with raw_server(b"", pause_s=20) as url, pytest.raises(ModelError):
        ModelClient(url, timeout_s=0.5).model()
    assert time.monotonic() - begun < 4


def test_a_server_that_drips_is_cut_off() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    begun = time.monotonic()
    with raw_server(head, *[b" "] * 900, pause_s=0.05) as url, pytest.raises(ModelError):
        ModelClient(url, timeout_s=0.6).model()
    assert time.monotonic() - begun < 4


def test_the_time_left_bounds_a_request() -> None:
    def slow(_: object) -> tuple[int, bytes]:
        time.sleep(1.5)
        return 200, completion("late")

    with model_server(slow) as server:
        client = ModelClient(server.url)
        client.model()
        begun = time.monotonic()
        with pytest.raises(ModelError):
            ask(client, within_s=0.3)
        assert time.monotonic() - begun < 1.2


def test_waiting_ends_when_the_server_comes_up_or_the_time_is_over() -> None:
    with model_server(lambda _: (200, completion("x")), (503, b"")) as server:
        client = ModelClient(server.url)
        with pytest.raises(ModelError):
            client.wait(0.3, pause_s=0.1)
        good = json.dumps({"data": [{"id": "late", "max_model_len": 100}]}).encode()
        timer = threading.Timer(0.4, lambda: setattr(server, "models", (200, good)))
        timer.start()
        assert client.wait(10, pause_s=0.1).name == "late"
        timer.join()


def test_an_answer_over_the_limit_is_not_read_to_its_end() -> None:
    with (
        model_server(lambda _: (200, completion("x" * MAX_ANSWER))) as server,
        pytest.raises(ModelError, match="longer than"),
    ):
        ask(ModelClient(server.url))
