"""One flag that every wait looks at; the first reason stays."""

from __future__ import annotations

import threading
import time

import pytest

from appliance.trial.stop import StopFlag, TrialAborted


def test_nothing_happens_before_somebody_asks() -> None:
    flag = StopFlag()
    flag.check()
    flag.sleep(0)
    flag.sleep(-5)
    assert (flag.requested, flag.reason, flag.failure) == (False, "", False)


def test_the_first_reason_stays() -> None:
    flag = StopFlag()
    flag.set("disk full", failure=True)
    flag.set("aborted on request")
    assert (flag.requested, flag.reason, flag.failure) == (True, "disk full", True)
    with pytest.raises(TrialAborted, match="disk full"):
        flag.check()
    with pytest.raises(TrialAborted, match="disk full"):
        flag.sleep(0)


def test_a_sleeper_wakes_at_once() -> None:
    flag = StopFlag()
    threading.Timer(0.1, flag.set, ("now",)).start()
    began = time.monotonic()
    with pytest.raises(TrialAborted, match="now"):
        flag.sleep(60)
    assert time.monotonic() - began < 10


def test_of_many_threads_exactly_one_reason_wins_whole() -> None:
    flag, start = StopFlag(), threading.Barrier(8)

    def ask(n: int) -> None:
        start.wait()
        flag.set(str(n), failure=bool(n % 2))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert flag.failure == bool(int(flag.reason) % 2)


def test_a_request_is_no_error_of_the_lab() -> None:
    """Code that catches the appliance's errors must not swallow a request to stop."""
    from appliance.errors import HotcellError

    assert not issubclass(TrialAborted, HotcellError)
