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
# A clock that is kept in step runs at most 500 ppm faster or slower (adjtimex(2)); what is more was a jump.
_SLEW = 0.001
_JITTER_S = 2.0


class SteadyClock:
    """Whether the host's wall clock went on evenly since this was made.

    The stamps of a capture, a probe and a journal are compared with one another: after a jump between them they
    say nothing. Sleep of the whole host counts as one.
    """

    def __init__(self, wall: Callable[[], float] = lambda: time.time(), clock: Clock = SYSTEM) -> None:
        self._wall, self._monotonic = wall, clock.monotonic
        self._began = (wall(), clock.monotonic())

    def require(self) -> None:
        """Make sure of it.

        Raises:
            LabError: the clock was set, or the host slept.
        """
        wall, passed = self._wall() - self._began[0], self._monotonic() - self._began[1]
        if abs(wall - passed) > _JITTER_S + _SLEW * passed:
            raise LabError(
                f"the host's clock jumped by {wall - passed:+.1f} s within {passed:.0f} s",
                hint="let the host's clock be kept in step (chrony, systemd-timesyncd) before trials are run",
            )


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
