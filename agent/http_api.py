"""The agent's HTTP endpoint: GET /health, POST /chat, POST /step. JSON in, JSON out, everything bounded.

Every error is ``{"error": {"what", "where", "found", "allowed"}}`` with a fitting status. Steps asked for
here run in terminals of their own, so that a probe never meets what the run has left in its terminals.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal, cast

from agent import NAME, __version__
from agent.errors import AgentError, FormatError, ModelError, shown
from agent.llm import ModelClient
from agent.tools import Finish, Toolbox, parse_action

State = Literal["idle", "working", "finished"]

MAX_BODY: Final = 65536  # bytes
MAX_MESSAGE: Final = 8192  # characters of a chat message
MAX_AT_ONCE: Final = 8  # requests in work
READ_S: Final = 30.0  # seconds a client may take between bytes
CHAT_TOKENS: Final = 32
_POST: Final = ("/chat", "/step")


class Refused(Exception):  # noqa: N818 - an answer to the client
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, error: FormatError) -> None:
        super().__init__(str(error))
        self.status = status
        self.error = error


def refuse(status: HTTPStatus, what: str, where: str, found: str, allowed: str) -> Refused:
    """The refusal with its four parts."""
    return Refused(status, FormatError(what, where=where, found=found, allowed=allowed))


class Service:
    """What the endpoint answers from. ``state`` is set by whoever runs the loop."""

    def __init__(self, client: ModelClient, tools: Toolbox) -> None:
        self._client = client
        self._tools = tools
        self.state: State = "idle"

    def health(self) -> dict[str, object]:
        """Who this is and whether it works on a task."""
        return {"agent": NAME, "version": __version__, "pid": os.getpid(), "state": self.state}

    def chat(self, body: dict[str, object]) -> dict[str, object]:
        """Ask the model: the message alone, temperature 0, seed 0, at most 32 tokens.

        Raises:
            Refused: a wrong body, or no answer from the model server.
        """
        _only(body, ("message",))
        message = body.get("message")
        if not isinstance(message, str) or not message.strip() or len(message) > MAX_MESSAGE:
            allowed = f"a string of 1 to {MAX_MESSAGE} characters"
            raise refuse(HTTPStatus.BAD_REQUEST, "wrong message", "body.message", shown(message), allowed)
        message = message.encode("utf-8", errors="replace").decode()
        try:
            answer = self._client.chat(
                [{"role": "user", "content": message}], max_tokens=CHAT_TOKENS, temperature=0.0, seed=0
            )
        except ModelError as error:
            raise refuse(
                HTTPStatus.BAD_GATEWAY,
                "the model server failed",
                "model",
                shown(str(error), 300),
                "an answer",
            ) from error
        return {"reply": answer.text, "model": answer.model}

    def step(self, body: dict[str, object]) -> dict[str, object]:
        """Take one tool step.

        Raises:
            Refused: a call that the tools would refuse, or FINISH.
        """
        try:
            action = parse_action(body, "body")
        except FormatError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, error) from error
        if isinstance(action, Finish):
            raise refuse(
                HTTPStatus.BAD_REQUEST, "not a step", "body.tool", "FINISH", "EXECUTE_CMD, RECEIVE_MSG"
            )
        return self._tools.run(action).as_dict()


def _only(body: dict[str, object], keys: tuple[str, ...]) -> None:
    extra = sorted(set(body) - set(keys))
    if extra:
        raise refuse(HTTPStatus.BAD_REQUEST, "unknown key", "body", shown(", ".join(extra)), ", ".join(keys))


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: Server
    server_version = "agent"
    sys_version = ""
    timeout = READ_S

    def do_GET(self) -> None:
        """Answer /health."""
        self._answer("GET")

    def do_POST(self) -> None:
        """Answer /chat and /step."""
        self._answer("POST")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing: request lines are a client's words."""

    def _answer(self, method: str) -> None:
        status, answer = HTTPStatus.OK, cast("dict[str, object]", {})
        try:
            answer = self._within_slots(method)
        except Refused as refused:
            status, answer = refused.status, {"error": refused.error.as_dict()}
        except (TimeoutError, ConnectionError):
            self.close_connection = True
            return
        except Exception as error:  # the endpoint outlives any one request
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            answer = {"error": {"what": f"{type(error).__name__}: {error}"[:300]}}
        self._send(status, answer)

    def _within_slots(self, method: str) -> dict[str, object]:
        """Route the request unless too many are in work."""
        if not self.server.slots.acquire(blocking=False):
            allowed = f"{MAX_AT_ONCE} requests at once"
            raise refuse(HTTPStatus.SERVICE_UNAVAILABLE, "busy", "server", "more", allowed)
        try:
            return self._route(method)
        finally:
            self.server.slots.release()

    def _route(self, method: str) -> dict[str, object]:
        path = self.path.split("?", 1)[0]
        if path not in ("/health", *_POST):
            raise refuse(
                HTTPStatus.NOT_FOUND, "no such path", "path", shown(path), "/health, " + ", ".join(_POST)
            )
        wanted = "POST" if path in _POST else "GET"
        if method != wanted:
            raise refuse(HTTPStatus.METHOD_NOT_ALLOWED, "wrong method", path, method, wanted)
        service = self.server.service
        if path == "/health":
            return service.health()
        body = self._body()
        return service.chat(body) if path == "/chat" else service.step(body)

    def _body(self) -> dict[str, object]:
        """The request body as an object.

        Raises:
            Refused: no or a wrong length, too large, cut short, not JSON, not an object.
        """
        said = self.headers.get("Content-Length", "")
        if not (said.isascii() and said.isdigit()) or self.headers.get("Transfer-Encoding"):
            raise refuse(
                HTTPStatus.LENGTH_REQUIRED, "no length", "Content-Length", shown(said), "a whole number"
            )
        if len(said) > 12 or int(said) > MAX_BODY:
            raise refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too large", "body", shown(said), f"{MAX_BODY} bytes"
            )
        raw = self.rfile.read(int(said))
        try:
            value: object = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise refuse(HTTPStatus.BAD_REQUEST, "not JSON", "body", shown(str(error)), "JSON") from error
        if not isinstance(value, dict):
            raise refuse(HTTPStatus.BAD_REQUEST, "not an object", "body", shown(value), "a JSON object")
        return cast("dict[str, object]", value)

    def _send(self, status: HTTPStatus, answer: dict[str, object]) -> None:
        data = json.dumps(answer).encode()
        self.close_connection = True
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
        except (TimeoutError, ConnectionError):
            return


class Server(ThreadingHTTPServer):
    """The listening endpoint."""

    daemon_threads = True

    def __init__(self, host: str, port: int, service: Service) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.service = service
        self.slots = threading.BoundedSemaphore(MAX_AT_ONCE)
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise AgentError(f"cannot listen on {host} port {port}: {error.strerror}") from error

    def server_bind(self) -> None:
        """Bind without the base class's reverse lookup of its own name: a guest may have no DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "agent", int(self.server_address[1])
