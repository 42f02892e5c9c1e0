"""Where a campaign strikes: drawn from a seed, each point by itself, so that any one can be repeated alone. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

# What the laboratory is doing -> the seconds within which the strike falls, after the trigger.
SCALES = {
    "start": 4.0, "restart": 3.0, "open": 6.0, "reset": 1.0, "snapshot": 8.0, "close": 1.0, "baseline": 25.0,
    "trial": 1.0, "seal": 0.3, "export": 5.0, "import": 5.0, "delete": 0.2, "build": 50.0,
}  # fmt: skip
# Journal entries after which a trial is struck: one for each transition that it writes down.
TRIAL_EVENTS = (
    "queued", "resetting", "proved", "capture-confirmed", "seal-examined", "preflight", "started", "step",
    "stopping", "stopped", "probe", "origin-frozen",
)  # fmt: skip
TRANSFERS = ("export", "import", "delete")
SEAL_EVENTS = ("collected", "scored", "sealed")
# Who or what is struck -> (its share of the points, what the laboratory is doing meanwhile).
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "server": (
        30,
        ("start", "restart", "open", "reset", "snapshot", "close", "baseline", "trial", "trial", "seal", *TRANSFERS),
    ),
    "server-and-warden": (12, ("open", "reset", "snapshot", "baseline", "trial", "trial", "seal", *TRANSFERS)),
    "warden": (12, ("open", "reset", "baseline", "trial", "trial", "seal")),
    "qemu": (16, ("open", "reset", "snapshot", "close", "baseline", "trial", "trial", "seal")),
    "tcpdump": (6, ("trial",)),
    "hang": (6, ("open", "reset", "trial")),
    "qga": (4, ("reset",)),
    "disk-full": (6, ("open", "reset", "snapshot", "import", "trial", "trial", "seal")),
    "read-only": (4, ("reset", "trial", "seal")),
    "clock": (4, ("reset", "trial")),
    "build": (0, ("build",)),
}  # fmt: skip
DEFAULT_KINDS = tuple(k for k, (share, _) in KINDS.items() if share)
# A trial without tcpdump yet, or no longer, would be a strike at nothing.
_WITH_CAPTURE = (
    "capture-confirmed",
    "seal-examined",
    "preflight",
    "started",
    "step",
    "stopping",
    "stopped",
    "probe",
)


class Point(NamedTuple):
    """One strike. ``event`` is the journal entry that it waits for, "" for none; ``pick`` chooses the victim."""

    number: int
    kind: str
    action: str
    event: str
    delay: float
    pick: float

    @property
    def where(self) -> str:
        """The moment, in words for a table."""
        return f"{self.action}{f':{self.event}' if self.event else ''}+{self.delay:.2f}s"


def draw(seed: int, number: int, kinds: Sequence[str]) -> Point:
    """Point ``number`` of the campaign of that seed and those kinds."""
    rng = random.Random(f"{seed}/{number}/{','.join(sorted(kinds))}")
    weights = [KINDS[k][0] or 1 for k in kinds]
    kind = rng.choices(list(kinds), weights)[0]
    action = rng.choice(KINDS[kind][1])
    events = {"trial": TRIAL_EVENTS, "seal": SEAL_EVENTS, "baseline": ("baseline-making",)}.get(action, ("",))
    if kind == "tcpdump":
        events = _WITH_CAPTURE
    return Point(
        number,
        kind,
        action,
        rng.choice(events),
        round(rng.random() * SCALES[action], 3),
        round(rng.random(), 6),
    )


def campaign(seed: int, count: int, kinds: Sequence[str]) -> list[Point]:
    """The first ``count`` points.

    Raises:
        ValueError: a kind does not exist.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"no such kind: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return [draw(seed, n, kinds) for n in range(count)]
