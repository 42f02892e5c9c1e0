"""Claims: one request at a time for a machine, all or nothing for a cell, and never a queue."""

from __future__ import annotations

import threading

import pytest

from appliance.errors import ConflictError
from appliance.pipeline.claims import ALL, Claims


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("origin", "origin", True),
        ("origin", "target-1", False),
        (ALL, "origin", True),
        ("origin", ALL, True),
        (ALL, ALL, True),
    ],
)
def test_who_excludes_whom(first: str, second: str, refused: bool) -> None:
    claims = Claims()
    with claims.hold("c1", first):
        with claims.hold("c2", second):
            pass
        if refused:
            with pytest.raises(ConflictError, match="busy"), claims.hold("c1", second):
                pass
        else:
            with claims.hold("c1", second):
                pass
    assert not claims.any()


def test_of_many_at_once_exactly_one_wins() -> None:
    claims, go, won, lost = Claims(), threading.Barrier(16), list[int](), list[int]()
    leave = threading.Event()

    def ask(number: int) -> None:
        go.wait()
        try:
            with claims.hold("c1", "origin"):
                won.append(number)
                leave.wait(10)
        except ConflictError:
            lost.append(number)
            if len(lost) == 15:
                leave.set()

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(won), len(lost)) == (1, 15)


def test_a_claim_ends_with_a_failure_too() -> None:
    claims = Claims()
    with pytest.raises(RuntimeError), claims.hold("c1", "origin"):
        raise RuntimeError
    with claims.hold("c1"):
        assert not claims.wait_free("c1", 0.01)
        assert claims.wait_free("c2", 0.01)


def test_waiting_ends_when_the_cell_is_free() -> None:
    claims, held, leave = Claims(), threading.Event(), threading.Event()

    def work() -> None:
        with claims.hold("c1", "origin"):
            held.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait(10)
    threading.Timer(0.1, leave.set).start()
    assert claims.wait_free("c1", 10)
    thread.join()
