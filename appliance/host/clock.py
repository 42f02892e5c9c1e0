"""The one way to wait: a condition, a limit, and words for what was awaited.

No other module sleeps in a loop. Time and sleep are passed in, so tests take none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from appliance.errors import HotcellError, LabError

T = TypeVar("T")


class Clock(NamedTuple):
    """Where time comes from: ``monotonic`` in seconds, and ``sleep`` of seconds."""

    monotonic: Callable[[], float]
    sleep: Callable[[float], None]


SYSTEM = Clock(time.monotonic, time.sleep)


class WaitError(LabError):
    """A condition did not come true within its limit."""

    code = "timed-out"


def wait_until(
    condition: Callable[[], T | None],
    deadline_s: float,
    describe: str | Callable[[], str],
    interval: float = 0.1,
    *,
    clock: Clock = SYSTEM,
    error: type[HotcellError] = WaitError,
) -> T:
    """The first truthy value of ``condition``, asked every ``interval`` seconds for ``deadline_s`` seconds.

    The condition is asked at least once and a last time at the deadline. What it raises passes through:
    a state that can never become true should be raised, not waited for. ``describe`` names what is awaited;
    as a function it is called at the end only, to report the state then seen.

    Raises:
        WaitError: (or ``error``) the limit passed; the message holds the limit and the last value seen.
    """
    end = clock.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        left = end - clock.monotonic()
        if left <= 0:
            what = describe if isinstance(describe, str) else describe()
            raise error(f"waited {deadline_s:g} s for {what}; last seen: {value!r:.200}", waited_s=deadline_s)
        clock.sleep(min(interval, left))
