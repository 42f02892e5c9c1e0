"""The five-part reply and the tool calls are read strictly: accept and reject tables, and fuzzing."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import FormatError
from agent.thinking import MAX_REPLY, PARTS, Thought, parse_reply, render
from agent.tools import MAX_COMMAND, Execute, Finish, Receive, action_dict, parse_action

ACTION = '{"tool": "EXECUTE_CMD", "command": "ls"}'


def reply(**changes: str) -> str:
    """A good reply with some parts' bodies replaced."""
    bodies = {
        "Explanation": " e",
        "Gaps": " g",
        "Findings": " f",
        "Plan": "\n1. one\n2. two\n3. three",
        "Action": " " + ACTION,
    }
    return "\n".join(f"{part}:{changes.get(part, bodies[part])}" for part in PARTS)


def command(more: str) -> str:
    """A good reply but for one more key in its EXECUTE_CMD call."""
    return reply(Action=' {"tool": "EXECUTE_CMD", "command": "a", ' + more + "}")


def test_a_good_reply_is_read_whole() -> None:
    thought = parse_reply(reply(Explanation=" first\n  second line"))
    assert thought == Thought("first\n  second line", "g", "f", ("one", "two", "three"), Execute("ls"))


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ('{"tool": "EXECUTE_CMD", "command": "a", "terminal": 5, "command_type": "long_running"}',
         Execute("a", 5, "long_running")),
        ('{"tool": "RECEIVE_MSG", "terminal": 3}', Receive(3)),
        ('{"tool": "RECEIVE_MSG"}', Receive(1)),
        ('{\n "tool": "FINISH",\n "message": "done \\u00e9"\n}', Finish("done é")),
    ],
)  # fmt: skip
def test_good_actions(text: str, action: object) -> None:
    assert parse_reply(reply(Action="\n" + text)).action == action


def test_windows_line_ends_and_outer_blanks_are_no_deviation() -> None:
    assert parse_reply("\n\n" + reply().replace("\n", "\r\n") + "\n \n").gaps == "g"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "line 1", "before the first part"),
        ("Sure! " + reply(), "line 1", "before the first part"),
        ("<think>\n" + reply(), "line 1", "before the first part"),
        (reply().replace("Gaps:", "gaps:"), "line 3", "out of order"),
        (reply().replace("Gaps: g\n", ""), "line 2", "out of order"),
        (reply() + "\nAction: " + ACTION, "line 9", "out of order"),
        (reply(Gaps=" g\nExplanation: again"), "line 3", "out of order"),
        (reply().split("Action")[0], "reply", "missing"),
        ("Explanation: e", "reply", "missing"),
        (reply(Explanation=""), "Explanation", "empty"),
        (reply(Findings="  \n "), "Findings", "empty"),
        (reply(Plan="\n1. one\n2. two"), "Plan", "three"),
        (reply(Plan="\n1. a\n2. b\n3. c\n4. d"), "Plan", "three"),
        (reply(Plan="\n1. a\n2. b\n4. c"), "Plan, step 3", "numbered"),
        (reply(Plan="\n1. a\n2.\n3. c"), "Plan, step 2", "numbered"),
        (reply(Plan="\n- a\n- b\n- c"), "Plan, step 1", "numbered"),
        (reply(Action=""), "Action", "JSON"),
        (reply(Action=" ls -l"), "Action", "JSON"),
        (reply(Action=f" ```json\n{ACTION}\n```"), "Action", "JSON"),
        (reply(Action=f" {ACTION}\nthat is all"), "Action", "JSON"),
        (reply(Action=f" [{ACTION}]"), "Action", "object"),
        (reply(Action=' {"tool": "FINISH", "message": "a", "message": "b"}'), "Action", "JSON"),
        (reply(Action=' {"tool": "RECEIVE_MSG", "terminal": NaN}'), "Action", "JSON"),
        (reply(Action=" " + "[" * 9000), "Action", "JSON"),
        (reply(Action=" " + "9" * 9000), "Action", "JSON"),
        (reply(Action=' {"tool": "RUN"}'), "Action.tool", "no such tool"),
        (reply(Action=' {"tool": ["EXECUTE_CMD"]}'), "Action.tool", "no such tool"),
        (reply(Action=' {"command": "ls"}'), "Action.tool", "no such tool"),
        (reply(Action=' {"tool": "EXECUTE_CMD"}'), "Action.command", "missing"),
        (reply(Action=' {"tool": "EXECUTE_CMD", "command": 3}'), "Action.command", "not a string"),
        (reply(Action=' {"tool": "EXECUTE_CMD", "command": " "}'), "Action.command", "length"),
        (reply(Action=' {"tool": "EXECUTE_CMD", "command": "a\\u0000"}'), "Action.command", "NUL"),
        (reply(Action=' {"tool": "EXECUTE_CMD", "command": "\\ud800"}'), "Action.command", "surrogate"),
        (command('"terminal": 0'), "Action.terminal", "terminal"),
        (command('"terminal": 6'), "Action.terminal", "terminal"),
        (command('"terminal": "1"'), "Action.terminal", "terminal"),
        (command('"terminal": true'), "Action.terminal", "terminal"),
        (command('"terminal": 1.0'), "Action.terminal", "terminal"),
        (command('"command_type": "x"'), "Action.command_type", "type"),
        (command('"cwd": "/"'), "Action", "unknown key"),
        (reply(Action=' {"tool": "RECEIVE_MSG", "message": "a"}'), "Action", "unknown key"),
        (reply(Action=' {"tool": "FINISH"}'), "Action.message", "missing"),
        ("x" * (MAX_REPLY + 1), "reply", "too long"),
    ],
)  # fmt: skip
def test_every_deviation_is_refused_with_its_place(text: str, where: str, what: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_reply(text)
    assert caught.value.where == where
    assert what in caught.value.what
    assert caught.value.found
    assert caught.value.allowed


def test_a_message_about_a_reply_holds_no_control_characters() -> None:
    with pytest.raises(FormatError) as caught:
        parse_reply("\x1b[2J\x00\u2028 hello")
    assert str(caught.value).isprintable()


def test_command_length_limit_is_exact() -> None:
    call = {"tool": "EXECUTE_CMD", "command": "x" * MAX_COMMAND}
    assert parse_action(call) == Execute("x" * MAX_COMMAND)
    with pytest.raises(FormatError):
        parse_action({**call, "command": "x" * (MAX_COMMAND + 1)})


@given(st.text(max_size=400))
def test_no_text_raises_anything_but_a_format_error(text: str) -> None:
    with contextlib.suppress(FormatError):
        parse_reply(text)


pieces = st.sampled_from(
    [*(p + ":" for p in PARTS), " ", "\n", "1. a", "2. b", "3. c", "{", "}", '"tool"', ":", '"FINISH"',
     ",", "1e999", ACTION, "\\", "\ud800", "\x00", "-0", "Infinity"]
)  # fmt: skip


@given(st.lists(pieces, max_size=40).map("".join))
def test_no_mixture_of_the_format_s_own_pieces_raises_anything_but_a_format_error(text: str) -> None:
    with contextlib.suppress(FormatError):
        parse_reply(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from(["tool", "command", "terminal", "command_type", "message", "x"]), json_values
    ),
    st.sampled_from(["EXECUTE_CMD", "RECEIVE_MSG", "FINISH", None]),
)
def test_no_json_value_raises_anything_but_a_format_error(value: dict[str, object], tool: str | None) -> None:
    if tool is not None:
        value = {**value, "tool": tool}
    with contextlib.suppress(FormatError):
        action = parse_action(value)
        assert parse_action(action_dict(action)) == action


words = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(
    lambda t: t.strip() == t and not t.startswith(tuple(p + ":" for p in PARTS))
)


@given(words, st.tuples(words, words, words), words.map(Finish) | words.map(Execute))
def test_what_is_rendered_is_read_back(
    text: str, plan: tuple[str, str, str], action: Execute | Finish
) -> None:
    thought = Thought(text, "g", "f", plan, action)
    assert parse_reply(render(thought)) == thought


def test_rendered_action_is_one_line_of_json() -> None:
    text = render(Thought("e", "g", "f", ("a", "b", "c"), Execute("echo 'a\nb'")))
    assert json.loads(text.splitlines()[-1].removeprefix("Action: "))["command"] == "echo 'a\nb'"
