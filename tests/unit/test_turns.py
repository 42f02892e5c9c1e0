"""The queue's two rules: batches take turns, and who waits for room is overtaken three times at most."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from appliance.pipeline.admission import Verdict
from appliance.pipeline.turns import OVERTAKEN_AT_MOST, Turns


def all_fit(_key: str) -> Verdict:
    return Verdict.ADMIT


def fits(*keys: str) -> Callable[[str], Verdict]:
    """Only these fit now; the others wait."""
    return lambda key: Verdict.ADMIT if key in keys else Verdict.WAIT


def drained(turns: Turns) -> list[str]:
    found = []
    while (key := turns.pick(all_fit)) is not None:
        found.append(key)
    return found


def test_without_batches_it_is_first_come_first_served() -> None:
    turns = Turns()
    for key in "abc":
        turns.put(key)
    assert drained(turns) == ["a", "b", "c"]
    assert len(turns) == 0


def test_batches_take_turns() -> None:
    turns = Turns()
    for n in range(4):
        turns.put(f"night-{n}", "night")
    turns.put("mine")
    turns.put("day-0", "day")
    assert turns.order() == ["night-0", "mine", "day-0", "night-1", "night-2", "night-3"]


def test_a_newcomer_comes_after_at_most_one_of_each_batch_and_never_before_who_had_that_turn() -> None:
    turns = Turns()
    for n in range(3):
        turns.put(f"a{n}", "a")
    assert turns.pick(all_fit) == "a0"
    turns.put("b0", "b")
    assert turns.order() == ["a1", "b0", "a2"]


def test_a_batch_that_was_withdrawn_does_not_count_against_its_next() -> None:
    turns = Turns()
    for n in range(5):
        turns.put(f"a{n}", "a")
    for n in range(5):
        turns.remove(f"a{n}")
    turns.put("a5", "a")
    turns.put("b0", "b")
    turns.put("b1", "b")
    assert drained(turns) == ["a5", "b0", "b1"]


def test_a_large_one_is_overtaken_three_times_and_then_all_wait() -> None:
    turns = Turns()
    turns.put("large")
    for n in range(9):
        turns.put(f"small-{n}")
    small = fits(*(f"small-{n}" for n in range(9)))
    assert [turns.pick(small) for _ in range(5)] == ["small-0", "small-1", "small-2", None, None]
    assert turns.pick(all_fit) == "large"
    assert turns.pick(small) == "small-3"


def test_who_never_fits_holds_up_nobody() -> None:
    turns = Turns()
    turns.put("huge")
    for n in range(6):
        turns.put(f"s{n}")
    verdicts: Callable[[str], Verdict] = lambda k: Verdict.NEVER if k == "huge" else Verdict.ADMIT  # noqa: E731
    assert [turns.pick(verdicts) for _ in range(7)] == [*(f"s{n}" for n in range(6)), None]
    assert turns.order() == ["huge"]


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 8)), min_size=1, max_size=40),
    st.integers(0, 60),
)
def test_everyone_gets_a_turn_whatever_arrives_meanwhile(first: list[tuple[str, int]], stream: int) -> None:
    """A host of 8 units; each job ends two turns after its start; every turn a small one of a new batch arrives."""
    turns, size, served = Turns(), dict[str, int](), list[str]()
    running: list[tuple[int, str]] = []
    for n, (batch, units) in enumerate(first):
        size[f"j{n}"] = units
        turns.put(f"j{n}", batch)
    overtaken = dict.fromkeys(size, 0)
    for tick in range(1000):
        if tick < stream:
            size[f"new{tick}"] = 1
            overtaken[f"new{tick}"] = 0
            turns.put(f"new{tick}", f"batch{tick}")
        running = [(end, k) for end, k in running if end > tick]
        ahead = turns.order()
        used = sum(size[k] for _, k in running)
        key = turns.pick(lambda k, used=used: Verdict.ADMIT if used + size[k] <= 8 else Verdict.WAIT)  # type: ignore[misc]
        if key is not None:
            for other in ahead[: ahead.index(key)]:
                overtaken[other] += 1
            running.append((tick + 2, key))
            served.append(key)
        if not len(turns) and tick >= stream:
            break
    assert sorted(served) == sorted(size)
    assert max(overtaken.values()) <= OVERTAKEN_AT_MOST


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=30))
def test_within_a_batch_nobody_is_passed_while_all_fit(batches: list[str]) -> None:
    turns = Turns()
    for n, batch in enumerate(batches):
        turns.put(f"{batch}{n:02d}", batch)
    got = drained(turns)
    for batch in "ab":
        mine = [k for k in got if k.startswith(batch)]
        assert mine == sorted(mine)
