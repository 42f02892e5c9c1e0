"""Machines that stand by: restored, run, proved and paused ahead of need, so that a reset only swaps.

A standby has its own overlay, tap and sockets from the start, under the cell id ``standby``, whose segment
nothing is ever plugged into. A cell that takes one has the ledger's rows change hands; the addresses and the
MAC are the machine's own, so two incarnations never meet on a segment: one of them is always unplugged.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from appliance.cell.baseline import Baseline, Workshop, check_files, prove, restore
from appliance.cell.custody import Custody
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind
from appliance.cell.libvirt_door import DomainState
from appliance.cell.processes import is_domain_process
from appliance.cell.proof import Proof
from appliance.cell.segment import Segment
from appliance.cell.wishes import Wishes
from appliance.errors import HotcellError, ResetError

STANDBY = "standby"
_CLOSE_S = 60.0
_HURRY_S = 2.0
_DROP_S = 8.0
Room = Callable[[Baseline], str]


class Standby(NamedTuple):
    """A paused, unplugged machine with the proof it was held against before it was paused."""

    machine: Incarnation
    baseline: Baseline
    proof: Proof


class StandbyPool:
    """Keeps one standby of each wanted baseline, made in a thread of its own. Safe from several threads.

    Those that the last owner wished which ended stay until they are taken, or somebody needs their room.
    ``room`` says why there is no room for one more machine of a baseline now, or "" if there is.
    """

    def __init__(self, shop: Workshop, room: Room = lambda _baseline: "") -> None:
        self._shop = shop
        self._room = room
        self._segment = Segment(STANDBY, shop.ledger)
        self._open = False
        self._closed = False
        self._wishes = Wishes()
        self._ready: dict[str, Standby] = {}
        self._hurried = 0
        self._hurry_until = 0.0
        self._changed = threading.Condition()
        self._custody = Custody(STANDBY, shop.ledger, self._changed)
        self._worker: threading.Thread | None = None
        self._unproved: tuple[Incarnation, Baseline, int] | None = None  # and in which generation it is made

    def ask(self, room: Room) -> None:
        """Whom to ask for room from now on."""
        self._room = room

    @property
    def in_use(self) -> set[str]:
        """The cell id that its things are written down under, while there may be any."""
        return {STANDBY} if self._open else set()

    def lost(self) -> set[tuple[Kind, str]]:
        """Rows of ours that no machine of the pool has: what is left of one that could not be destroyed.

        Raises:
            LabError: the ledger cannot be read.
        """
        return self._custody.lost()

    def ready(self) -> dict[str, Incarnation]:
        """What stands by now, by baseline id."""
        with self._changed:
            return {k: s.machine for k, s in self._ready.items()}

    def missing(self) -> dict[str, str]:
        """Wanted baselines of which none stands by, with the reason ("" while it is being made)."""
        with self._changed:
            return {k: self._wishes.why_missing(k) for k in self._wishes.all if k not in self._ready}

    def keep(self, owner: str, baselines: Iterable[Baseline]) -> None:
        """Have one standby of each of these for ``owner`` from now on, in place of what it wished before.

        What could not be made before is tried again.
        """
        with self._changed:
            if self._closed:
                return
            # Of a device there is no second one, so nothing that has one can stand by.
            self._wishes.keep(owner, [b for b in baselines if not b.machine.devices])
            surplus = self._take_surplus()
            if self._wishes.all and self._worker is None:
                self._worker = threading.Thread(target=self._work, name="standbys", daemon=True)
                self._worker.start()
            self._changed.notify_all()
        self._custody.destroy(s.machine for s in surplus)

    def forget(self, owner: str) -> None:
        """An owner has ended. Its standbys stay for the next one; those of who ended before it go.

        What could not be made before for those who are there is tried again.
        """
        with self._changed:
            if not self._wishes.part(owner):
                return
            surplus = self._take_surplus()
            self._changed.notify_all()
        self._custody.destroy(s.machine for s in surplus)

    def drop(self, baseline_id: str) -> None:
        """Nobody wishes this baseline any more, and its standby goes.

        One that is being made, or that somebody else ends, is waited for, but not long.
        """
        with self._changed:
            self._wishes.drop(baseline_id)
            surplus = self._take_surplus()
            self._changed.notify_all()
        self._custody.destroy(s.machine for s in surplus)
        self._custody.destroy_lost()
        self._custody.wait_none_of(baseline_id, _DROP_S)

    def _take_surplus(self) -> list[Standby]:
        """What stands by and nobody wants; one that is being made is killed, since it may boot for minutes."""
        wanted = self._wishes.all
        if self._unproved is not None:
            machine, baseline, generation = self._unproved
            if not self._current(baseline, generation):
                machine.kill()  # whoever waits for it to answer sees that it is gone
        return [self._ready.pop(k) for k in list(self._ready) if k not in wanted]

    def _take_all(self) -> list[Standby]:
        """Everything that stands by; :meth:`_take_surplus` first, for what is being made."""
        surplus = self._take_surplus()
        surplus += self._ready.values()
        self._ready.clear()
        return surplus

    def take(self, baseline: Baseline, cell: str) -> tuple[Standby | None, str]:
        """Hand the standby of this baseline over to a cell, still paused and unplugged; or None and why not.

        Another one is made in the background, if it is still wanted.
        """
        with self._changed:
            found = self._ready.pop(baseline.id, None)
            if found is not None:
                self._wishes.taken(baseline.id)
            why = self._wishes.why_missing(baseline.id) or (
                "the next one is not ready yet" if baseline.id in self._wishes.all else "none is kept"
            )
            self._changed.notify_all()
        if found is None:
            return None, why
        try:
            _require_unchanged(found, baseline)
            found.machine.move_to(cell)
        except Exception as e:  # noqa: BLE001 - whatever it was, this one is not used, and ends
            self._custody.destroy([found.machine])
            return None, f"withheld: {_told(e)}"
        self._custody.let_go(found.machine)
        return found, ""

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Begin to make no standby meanwhile, for 2 s at most: it would take half the host from who is in a hurry."""
        with self._changed:
            if not self._hurried:  # who comes later prolongs nothing
                self._hurry_until = time.monotonic() + _HURRY_S
            self._hurried += 1
        try:
            yield
        finally:
            with self._changed:
                self._hurried -= 1
                self._changed.notify_all()

    def wait_ready(self, limit_s: float) -> bool:
        """Wait until everything that is wanted stands by; False if it does not in time or cannot."""
        deadline = time.monotonic() + limit_s
        with self._changed:
            while any(k not in self._ready for k in self._wishes.all):
                left = deadline - time.monotonic()
                if left <= 0 or self._wishes.settled(self._ready):
                    return False
                self._changed.wait(left)
        return True

    def try_again(self) -> None:
        """There may be room now: make what could not be made before, or was given up."""
        with self._changed:
            self._wishes.ask_anew()
            self._changed.notify_all()

    def give_up(self, why: str) -> int:
        """Destroy every standby, to be made again once it is tried again; returns how many there were.

        The wishes of who is there stay, and ``why`` is why none stands by.
        """
        with self._changed:
            self._wishes.give_up(why)
            given_up = self._take_all()
            self._changed.notify_all()
        self._custody.destroy(s.machine for s in given_up)
        return len(given_up)

    def drop_all(self) -> int:
        """Destroy every standby and want none; returns how many there were."""
        with self._changed:
            self._wishes.clear()
            dropped = self._take_all()
        self._custody.destroy(s.machine for s in dropped)
        return len(dropped)

    def close(self) -> None:
        """Destroy every standby and the segment; nothing of the pool is left."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            worker = self._worker
        self.drop_all()
        if worker is not None:
            worker.join(_CLOSE_S)
            if worker.is_alive():
                return  # its machine goes when it is made; until then our things are in use
        self._custody.destroy_lost()
        if self._open:
            self._segment.close()
            self._open = False
        with contextlib.suppress(OSError):  # none was made, or one withstood and the sweep takes it
            (self._shop.paths.cells / STANDBY).rmdir()

    # -- making ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._wishes.settled(self._ready))
                while not self._closed and (left := self._hurry_left()) > 0:
                    self._changed.wait(left)
                if self._closed:
                    return
                baseline = self._wishes.next(self._ready)
                generation, asked = self._wishes.generation, self._wishes.asked
                self._custody.making = baseline.id if baseline is not None else ""
            if baseline is not None:
                self._add(baseline, generation, asked)

    def _hurry_left(self) -> float:
        return self._hurry_until - time.monotonic() if self._hurried else 0.0

    def _add(self, baseline: Baseline, generation: int, asked: int) -> None:
        why, made, failed = "", None, False
        self._custody.destroy_lost()
        try:
            why = self._room(baseline)
            if why and self._give_up_parting(baseline):
                why = self._room(baseline)
            if not why:
                made = self._make(baseline, generation)
        except Exception as e:  # noqa: BLE001 - without a standby a reset is slower, and says why
            why, failed = _told(e), True
        with self._changed:
            current = self._current(baseline, generation)
            if made is not None:
                self._custody.hold(made.machine, baseline.id)
            if made is not None and current:
                self._ready[baseline.id], made = made, None
            elif current and (failed or asked == self._wishes.asked):  # else there may be room meanwhile
                self._wishes.not_made(baseline.id, why)
            self._changed.notify_all()
        if made is not None:
            self._custody.destroy([made.machine])
        self._custody.made()

    def _give_up_parting(self, baseline: Baseline) -> bool:
        """End what only the last one that ended had wished, if it is in the way; True if anything was."""
        with self._changed:
            if not self._wishes.give_up_parting(baseline.id):
                return False
            surplus = self._take_surplus()
        self._custody.destroy(s.machine for s in surplus)
        return bool(surplus)

    def _current(self, baseline: Baseline, generation: int) -> bool:
        """Whether what was begun in this generation is wanted still."""
        return generation == self._wishes.generation and self._wishes.all.get(baseline.id) == baseline

    def _make(self, baseline: Baseline, generation: int) -> Standby:
        self._make_segment()
        began = time.monotonic()
        machine = restore(self._shop, baseline, STANDBY)
        with self._changed:
            self._unproved = machine, baseline, generation
            if not self._current(baseline, generation):  # by now: who asked for its end could not kill it yet
                machine.kill()
        try:
            standby = Standby(machine, baseline, prove(machine, baseline, began, will_stand_by=True))
            _require_proved(standby)
            machine.pause()
        except BaseException:
            self._custody.hold(machine, baseline.id)
            self._custody.destroy([machine])
            raise
        finally:
            with self._changed:
                self._unproved = None
        return standby

    def _make_segment(self) -> None:
        if self._open:
            return
        self._open = True  # from here on there may be something of ours
        try:
            self._segment.open()
        except BaseException:
            self._segment.close()
            self._open = False
            raise


def _require_proved(standby: Standby) -> None:
    if not standby.proof.proved:
        raise ResetError(f"a standby of {standby.baseline.id} was withheld: {standby.proof.failures}")


def _require_unchanged(standby: Standby, baseline: Baseline) -> None:
    """A paused machine cannot change itself; make sure that nobody else changed or replaced it meanwhile.

    Raises:
        ResetError: it is not what was proved.
    """
    machine = standby.machine
    check_files(baseline)
    problems = [
        *(["the baseline was made anew"] if standby.baseline != baseline else []),
        *(["it is not paused"] if machine.state is not DomainState.PAUSED else []),
        *(["it was plugged in"] if machine.plugged else []),
        *(["its process is another"] if not is_domain_process(machine.pid or 0, machine.domain) else []),
    ]
    for file in machine.own_files:
        try:
            if file.path.stat().st_ino != file.inode:
                problems.append(f"its {file.what} is another file")
        except OSError as e:
            problems.append(f"its {file.what}: {e.strerror}")
    if problems:
        raise ResetError(f"the standby of {baseline.id}: " + ", ".join(problems))


def _told(error: Exception) -> str:
    return error.message if isinstance(error, HotcellError) else f"{type(error).__name__}: {error}"
