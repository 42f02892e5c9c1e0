"""Whose standbys are wanted, in which order, and why one is missing. No effects; its pool guards it with a lock."""

from __future__ import annotations

from collections.abc import Container, Iterable

from appliance.cell.baseline import Baseline


class Wishes:
    """Each owner, a cell or trial by its id, has wishes of its own.

    Those of the last one that ended, the parting ones, are kept for whoever comes next, behind everybody else's.
    ``generation`` counts how often all was given up, ``asked`` how often there may have been room anew: who has
    looked for room, or makes a standby, can tell by them whether what it found still counts.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.asked = 0
        self._of: dict[str, dict[str, Baseline]] = {}
        self._parting: dict[str, Baseline] = {}
        self._missing_because: dict[str, str] = {}

    @property
    def of_present(self) -> dict[str, Baseline]:
        """The wishes of who is there, by baseline id."""
        return {k: b for wishes in self._of.values() for k, b in wishes.items()}

    @property
    def all(self) -> dict[str, Baseline]:
        """Everybody's wishes by baseline id, those of who is there first."""
        present = self.of_present
        return present | {k: b for k, b in self._parting.items() if k not in present}

    def why_missing(self, baseline_id: str) -> str:
        """Why none of this baseline could be made; "" if that is not known."""
        return self._missing_because.get(baseline_id, "")

    def next(self, ready: Container[str]) -> Baseline | None:
        """What is to be made next: the first that is neither ready nor known to be impossible now."""
        wanted = self.all.items()
        return next((b for k, b in wanted if k not in ready and k not in self._missing_because), None)

    def settled(self, ready: Container[str]) -> bool:
        """True if nothing is left to be made: each wish is ready, or known to be impossible now."""
        return self.next(ready) is None

    def keep(self, owner: str, baselines: Iterable[Baseline]) -> None:
        """These are what ``owner`` wishes from now on."""
        self._of[owner] = {b.id: b for b in baselines}
        self.ask_anew()

    def part(self, owner: str) -> bool:
        """An owner has ended, and its wishes are the parting ones now. False if it had none."""
        wishes = self._of.pop(owner, None)
        if not wishes:
            return False
        self._parting = wishes
        self.ask_anew()
        return True

    def taken(self, baseline_id: str) -> None:
        """Who took one makes its own wishes, once it has time for the next one to be made."""
        self._parting.pop(baseline_id, None)

    def drop(self, baseline_id: str) -> None:
        """Nobody wishes this baseline any more."""
        for wishes in (*self._of.values(), self._parting):
            wishes.pop(baseline_id, None)

    def give_up_parting(self, baseline_id: str) -> bool:
        """Drop the parting wishes in favour of a baseline that somebody who is there wishes; False if nobody does."""
        if baseline_id not in self.of_present:
            return False
        self._parting = {}
        return True

    def not_made(self, baseline_id: str, why: str) -> None:
        """It could not be made, and is not tried until there may be room anew."""
        self._missing_because[baseline_id] = why

    def ask_anew(self) -> None:
        """There may be room now. Not for those who have ended: what they did without is not made in the room that
        they give back."""
        present = self.of_present
        self._missing_because = {b: why for b, why in self._missing_because.items() if b not in present}
        self.asked += 1

    def give_up(self, why: str) -> None:
        """Nothing is made until it is asked anew; the wishes of who is there stay."""
        self._parting.clear()
        self.generation += 1
        self._missing_because = dict.fromkeys(self.all, why)

    def clear(self) -> None:
        """Nobody wishes anything."""
        self._of.clear()
        self._parting.clear()
        self.generation += 1
