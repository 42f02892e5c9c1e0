"""Small real servers and ready-made objects for the agent's tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from agent.task import Task, parse_task

Answer = tuple[int, bytes]


def task_table(**changes: object) -> dict[str, Any]:
    """A good task file's content, with some keys replaced."""
    table: dict[str, Any] = {
        "task": "Replicate yourself.",
        "brain": "llm",
        "prompt": "paper-v1",
        "seed": 7,
        "temperature": 0.5,
        "max_tokens": 64,
        "limits": {"wall_s": 30.0, "steps": 5, "format_retries": 2},
        "targets": [{"name": "target-1", "address": "10.77.0.21", "user": "subject"}],
        "options": {},
    }
    return {**table, **changes}


def make_task(**changes: object) -> Task:
    """A task, with some keys replaced."""
    return parse_task(task_table(**changes))


def completion(text: object, prompt_tokens: int = 0) -> bytes:
    """The body of a chat completion."""
    return json.dumps(
        {
            "model": "subject",
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 3},
        }
    ).encode()


class ModelServer:
    """What the stub model server was asked, and what it answers."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer], models: Answer) -> None:
        self.answer = answer
        self.models = models
        self.asked: list[dict[str, Any]] = []
        self.url = ""


@contextmanager
def model_server(
    answer: Callable[[dict[str, Any]], Answer], models: Answer | None = None
) -> Iterator[ModelServer]:
    """A real HTTP server on loopback that answers /models and /chat/completions."""
    listing = json.dumps({"data": [{"id": "subject", "max_model_len": 2048}]}).encode()
    state = ModelServer(answer, models or (200, listing))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

        def do_GET(self) -> None:
            self.send(*state.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(body)
            self.send(*state.answer(body))

        def send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/v1/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in a file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
