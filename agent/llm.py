"""A client of the OpenAI-compatible server beside the agent, over urllib: bounded in time and size.

No proxy of the environment is used and no redirect is followed: the server is on this machine.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypedDict, cast

from agent.errors import ModelError, shown

TIMEOUT_S: Final = 120.0  # without KVM 100 tokens of a tiny model take about 5 s, and the host may be busy
MAX_ANSWER: Final = 1 << 20  # bytes
CONTEXT: Final = 2048  # tokens, where the server does not say


class Message(TypedDict):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The served model: its name and its context in tokens."""

    name: str
    context: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. Token counts are 0 where the server did not say."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    stopped: str


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Turns every redirect into an HTTP error."""

    def redirect_request(self, *_args: object, **_kwargs: object) -> None:
        return None


class ModelClient:
    """Speaks to ``base_url`` (ends in ``/v1``)."""

    def __init__(self, base_url: str, timeout_s: float = TIMEOUT_S) -> None:
        self._base = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        self._model: ModelInfo | None = None

    def model(self, *, within_s: float | None = None) -> ModelInfo:
        """The first model the server lists; asked once.

        Raises:
            ModelError: no answer, or one of another shape.
        """
        if self._model is None:
            answer = self._request("/models", None, within_s)
            first = _first(answer.get("data"))
            name, context = first.get("id"), first.get("max_model_len", CONTEXT)
            if not isinstance(name, str) or not isinstance(context, int) or context < 1:
                raise ModelError(f"the server lists no usable model: {shown(answer)}")
            self._model = ModelInfo(name, context)
        return self._model

    def wait(self, limit_s: float, pause_s: float = 2.0) -> ModelInfo:
        """Like :meth:`model`, asked again until it answers or ``limit_s`` seconds are over."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                return self.model(within_s=min(30.0, self._timeout_s))
            except ModelError:
                if time.monotonic() + pause_s > deadline:
                    raise
            time.sleep(pause_s)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        within_s: float | None = None,
    ) -> Completion:
        """One chat completion.

        Raises:
            ModelError: no answer in time, an HTTP error (its status is kept), or an answer of another shape.
        """
        body: dict[str, object] = {
            "model": self.model().name,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        answer = self._request("/chat/completions", body, within_s)
        choice = _first(answer.get("choices"))
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        if text is None:
            text = ""  # a model that stops at once says nothing, and that is an answer
        if not isinstance(text, str):
            raise ModelError(f"the answer holds no text: {shown(answer)}")
        usage = answer.get("usage")
        counts = cast("dict[str, object]", usage) if isinstance(usage, dict) else {}
        return Completion(
            text=text,
            model=str(answer.get("model", ""))[:200],
            prompt_tokens=_count(counts.get("prompt_tokens")),
            completion_tokens=_count(counts.get("completion_tokens")),
            stopped=str(choice.get("finish_reason", ""))[:40],
        )

    def _request(
        self, path: str, body: dict[str, object] | None, within_s: float | None
    ) -> dict[str, object]:
        """One request; the answer must be a JSON object."""
        timeout = max(0.1, self._timeout_s if within_s is None else min(within_s, self._timeout_s))
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._base + path, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=timeout) as response:
                raw = _read(response, time.monotonic() + timeout)
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(300).decode("utf-8", errors="replace")
            raise ModelError(f"{path}: HTTP {error.code}: {shown(detail, 200)}", status=error.code) from error
        except (OSError, http.client.HTTPException) as error:
            raise ModelError(f"{path}: no answer from {self._base}: {error}") from error
        try:
            answer: object = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path}: the answer is not JSON: {error}") from error
        if not isinstance(answer, dict):
            raise ModelError(f"{path}: the answer is not an object: {shown(answer)}")
        return cast("dict[str, object]", answer)


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body, bounded in size and in time even where it drips."""
    raw = bytearray()
    while chunk := response.read1(65536):
        raw += chunk
        if len(raw) > MAX_ANSWER:
            raise ModelError(f"the answer is longer than {MAX_ANSWER} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long")
    return bytes(raw)


def _first(value: object) -> dict[str, object]:
    """The first object of a list, or an empty one."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return cast("dict[str, object]", value[0])
    return {}


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
