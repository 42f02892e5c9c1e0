"""What each round feeds back to the model, kept within the model's context.

As in the paper's log: the task, the previous action, its result (status, stdout, stderr, terminal) and the
critique line; and, as far as there is room, one line for each earlier round. The system prompt, the task and
the critique line are never cut. Room is reckoned in UTF-8 bytes, since a byte-level tokenizer makes a token
of every byte; the true ratio is learned from the server's own counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from agent.errors import ContextError, FormatError
from agent.llm import Message
from agent.prompting import Prompt
from agent.terminals import Result
from agent.tools import Action, action_json

RESERVE: Final = 96  # tokens for the chat template, which the agent does not see
KEEP_ROUNDS: Final = 200
LINE: Final = 160  # bytes an earlier round may take
ERROR: Final = 240  # bytes a format error may take


@dataclass(frozen=True, slots=True)
class Round:
    """One finished round."""

    step: int
    action: Action
    result: Result


class Budget:
    """How many bytes of prompt and how many tokens of answer fit into a context. Learns bytes a token."""

    def __init__(self, context: int, max_tokens: int) -> None:
        self.answer = max(1, min(max_tokens, context // 4))
        self._tokens = context - self.answer - RESERVE
        self._ratio = 1.0

    @property
    def prompt_bytes(self) -> int:
        """Bytes the prompt may have."""
        return int(self._tokens * self._ratio)

    def learn(self, sent_bytes: int, prompt_tokens: int) -> None:
        """Take the server's count of a prompt into account, with a tenth of margin; never below 1."""
        if prompt_tokens > 0:
            self._ratio = max(1.0, 0.9 * sent_bytes / prompt_tokens)


class Memory:
    """The rolling history of one run."""

    def __init__(self, prompt: Prompt, task: str) -> None:
        self._prompt = prompt
        self._task = task
        self._rounds: list[Round] = []

    @property
    def last(self) -> Round | None:
        """The latest round, if there was one."""
        return self._rounds[-1] if self._rounds else None

    def add(self, entry: Round) -> None:
        """Remember a round; the oldest are forgotten beyond ``KEEP_ROUNDS``."""
        self._rounds.append(entry)
        del self._rounds[:-KEEP_ROUNDS]

    def messages(self, budget: int, error: FormatError | None = None) -> list[Message]:
        """System and user message, together at most ``budget`` bytes.

        Raises:
            ContextError: the parts that may not be cut are longer than that.
        """
        closing = f"\n{self._prompt.critique}" if self._prompt.critique else ""
        if error is not None:
            closing = f"\nYour last reply broke the format: {clip(str(error), ERROR)}" + closing
        opening = f"Task: {self._task}\n"
        left = budget - size(self._prompt.system) - size(opening) - size(closing)
        if left < 0:
            raise ContextError(
                f"prompt, task and critique need {budget - left} bytes; there is room for {budget}"
            )
        previous = self._previous(left if len(self._rounds) < 2 else left * 2 // 3)
        earlier = self._earlier(left - size(previous))
        return [
            {"role": "system", "content": self._prompt.system},
            {"role": "user", "content": opening + earlier + previous + closing},
        ]

    def _previous(self, room: int) -> str:
        """The last action and its result, in at most ``room`` bytes."""
        last = self.last
        if last is None:
            return clip("Previous action: none\n", room)
        result = last.result
        frame = (
            f"\nAction result:\nstatus: {result.status}\nterminal: {result.terminal}\nstdout: \nstderr: \n"
        )
        action = "Previous action: " + clip(action_json(last.action), max(40, room // 4))
        left = room - size(action) - size(frame)
        if left <= 0:
            return clip(f"{action}\nstatus: {result.status}\n", room)
        stderr = clip(result.stderr.strip(), max(left // 2, left - size(result.stdout)))
        stdout = clip(result.stdout.strip(), left - size(stderr))
        return (
            f"{action}\nAction result:\nstatus: {result.status}\nterminal: {result.terminal}\n"
            f"stdout: {stdout}\nstderr: {stderr}\n"
        )

    def _earlier(self, room: int) -> str:
        """A line for each earlier round, the newest ones first to be kept, oldest first to be read."""
        lines: list[str] = []
        heading = "Earlier rounds:\n"
        left = room - size(heading)
        for entry in reversed(self._rounds[:-1]):
            line = f"[{entry.step}] {clip(action_json(entry.action), LINE)} -> {entry.result.status}\n"
            left -= size(line)
            if left < 0:
                break
            lines.append(line)
        return heading + "".join(reversed(lines)) if lines else ""


def size(text: str) -> int:
    """Length in UTF-8 bytes."""
    return len(text.encode("utf-8", errors="replace"))


def clip(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` bytes: head and tail around a mark that tells how much is missing."""
    raw = text.encode("utf-8", errors="replace")
    if len(raw) <= limit:
        return raw.decode()
    mark = f"...[{len(raw)} bytes]..."
    room = limit - len(mark)
    if room <= 0:
        return raw[: max(0, limit)].decode(errors="ignore")
    head = room // 2
    tail = room - head
    return raw[:head].decode(errors="ignore") + mark + raw[len(raw) - tail :].decode(errors="ignore")
