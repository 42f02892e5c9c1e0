"""Makings that several requests share: made once, left one by one, ended by the last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from appliance.errors import LabError
from appliance.trial.making import Makers, Making


class Left(Exception):  # noqa: N818 - not an error
    """What a request's check raises when it no longer wants to wait."""


class Kiln:
    """A making that lasts until it is told to go on or is ended; counts how often it was begun."""

    def __init__(self) -> None:
        self.makers: Makers[str] = Makers()
        self.begun = 0
        self.go_on = threading.Event()
        self.killed = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def make(self, making: Making[str]) -> str:
        self.begun += 1
        making.tell("booting")
        making.stoppable(self.killed.set)
        while not self.go_on.wait(0.01):
            if self.killed.is_set():
                self.gate.wait(10)
                raise LabError("the template was killed")
        making.tell("", 2.5)
        return f"made {self.begun}"


class Request:
    """One who asks, in a thread of its own."""

    def __init__(self, kiln: Kiln, key: str = "k") -> None:
        self.leave = threading.Event()
        self.heard: list[tuple[str, float]] = []
        self.got: str | None = None
        self.failure: Exception | None = None
        self._kiln, self._key = kiln, key
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _check(self) -> None:
        if self.leave.is_set():
            raise Left

    def _ask(self) -> None:
        try:
            self.got = self._kiln.makers.get(
                self._key, self._kiln.make, lambda d, s: self.heard.append((d, s)), self._check
            )
        except (Left, LabError) as e:
            self.failure = e

    def join(self) -> Request:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self


def wait_for(condition: Callable[[], object], limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def kiln() -> Kiln:
    return Kiln()


def test_all_who_ask_get_the_one_that_was_made_and_all_its_news(kiln: Kiln) -> None:
    first = Request(kiln)
    wait_for(lambda: first.heard)
    second = Request(kiln)
    wait_for(lambda: second.heard)
    kiln.go_on.set()
    for request in (first.join(), second.join()):
        assert request.got == "made 1"
        assert request.heard == [("booting", 0.0), ("", 2.5)]
    assert kiln.begun == 1


def test_who_leaves_does_not_end_it_for_the_others(kiln: Kiln) -> None:
    first, second = Request(kiln), Request(kiln)
    wait_for(lambda: first.heard and second.heard)
    first.leave.set()
    assert isinstance(first.join().failure, Left)
    assert not kiln.killed.is_set()
    kiln.go_on.set()
    assert second.join().got == "made 1"


def test_the_last_who_leaves_ends_it(kiln: Kiln) -> None:
    first, second = Request(kiln), Request(kiln)
    wait_for(lambda: first.heard and second.heard)
    first.leave.set()
    second.leave.set()
    assert isinstance(first.join().failure, Left)
    assert isinstance(second.join().failure, Left)
    assert kiln.killed.wait(10)
    assert kiln.makers.wait(10)


def test_one_that_is_ending_is_not_joined(kiln: Kiln) -> None:
    kiln.gate.clear()
    first = Request(kiln)
    wait_for(lambda: first.heard)
    first.leave.set()
    first.join()
    late = Request(kiln)
    time.sleep(0.25)
    assert kiln.begun == 1, "the ending one is gone first"
    kiln.killed.clear()
    kiln.go_on.set()
    kiln.gate.set()
    assert late.join().got is not None
    assert late.failure is None


def test_a_failure_is_everybodys(kiln: Kiln) -> None:
    requests = [Request(kiln) for _ in range(3)]
    wait_for(lambda: all(r.heard for r in requests))
    kiln.makers.end_all()
    for request in requests:
        assert "killed" in str(request.join().failure)
    assert kiln.makers.wait(10)


def test_keys_are_made_side_by_side(kiln: Kiln) -> None:
    requests = [Request(kiln, key) for key in ("a", "b")]
    wait_for(lambda: kiln.begun == 2)
    kiln.go_on.set()
    assert all(r.join().got for r in requests)


def test_one_that_is_ended_before_it_can_be_killed_stops_itself() -> None:
    making: Making[str] = Making()
    making.end()
    with pytest.raises(LabError, match="was ended"):
        making.stoppable(lambda: None)
