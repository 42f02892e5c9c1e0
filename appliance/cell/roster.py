"""Which machines a cell has, which are ending, and which baseline each belongs on: one book, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from appliance.cell.baseline import Baseline
from appliance.cell.incarnation import Incarnation
from appliance.errors import NotFoundError


class Roster:
    """The book of one cell; safe from several threads. What it returns are copies."""

    def __init__(self, cell_id: str) -> None:
        self._cell = cell_id
        self._lock = threading.Lock()
        self._machines: dict[str, Incarnation] = {}
        self._dying: dict[str, Incarnation] = {}
        self._baselines: dict[str, Baseline] = {}
        self._ends: list[Future[None]] = []

    # -- looking --------------------------------------------------------------------------------------

    def machines(self) -> dict[str, Incarnation]:
        """What there is now, in the order in which machines were first asked for."""
        with self._lock:
            names = [*self._baselines, *(n for n in self._machines if n not in self._baselines)]
            return {n: self._machines[n] for n in names if n in self._machines}

    def everything(self) -> list[Incarnation]:
        """Machines, and those that are ending."""
        with self._lock:
            return [*self._machines.values(), *self._dying.values()]

    def baselines(self) -> dict[str, Baseline]:
        """What each machine was last proved against, lost machines included."""
        with self._lock:
            return dict(self._baselines)

    def machine(self, name: str) -> Incarnation:
        """A machine by name.

        Raises:
            NotFoundError: there is none of that name, or it was lost.
        """
        machines = self.machines()
        if name not in machines:
            lost = name in self.baselines()
            known = ", ".join(sorted(machines)) or "none"
            raise NotFoundError(
                f"cell {self._cell} has no machine {name!r}" + (": it was withheld or lost" if lost else ""),
                hint=f"a reset brings {name} back" if lost else f"it has: {known}",
            )
        return machines[name]

    def baseline(self, name: str) -> Baseline:
        """The baseline of a machine by name, also of one that was lost.

        Raises:
            NotFoundError: the cell never had a machine of that name.
        """
        baselines = self.baselines()
        if name not in baselines:
            known = ", ".join(sorted(baselines)) or "none"
            raise NotFoundError(f"cell {self._cell} has no machine {name!r}", hint=f"it has: {known}")
        return baselines[name]

    # -- coming and going -----------------------------------------------------------------------------

    def expect(self, baseline: Baseline) -> None:
        """A machine is about to be made of this; kept as its baseline if it is the first."""
        with self._lock:
            self._baselines.setdefault(baseline.machine.name, baseline)

    def proved(self, baseline: Baseline) -> None:
        """A machine was proved against this."""
        with self._lock:
            self._baselines[baseline.machine.name] = baseline

    def enter(self, machine: Incarnation) -> None:
        """A machine is the cell's from now on."""
        with self._lock:
            self._machines[machine.name] = machine

    def give_up(self, name: str) -> Incarnation:
        """Take a machine out; from then on its end is the caller's."""
        with self._lock:
            return self._machines.pop(name)

    def dies(self, machine: Incarnation, begin: Callable[[], list[Future[None]]] = list) -> None:
        """A machine is nobody's any more; it stays known until it is gone. ``begin`` begins to end it.

        In one step: nobody sees it dying without the end that is under way.
        """
        with self._lock:
            self._dying[machine.id] = machine
            self._out(machine)
            self._ends = [*(f for f in self._ends if not f.done()), *begin()]

    def gone(self, machine: Incarnation) -> None:
        """Nothing of a machine is left."""
        with self._lock:
            self._dying.pop(machine.id, None)
            self._out(machine)

    def _out(self, machine: Incarnation) -> None:
        if self._machines.get(machine.name) is machine:
            del self._machines[machine.name]

    def ends(self) -> list[Future[None]]:
        """Ends under way."""
        with self._lock:
            return [f for f in self._ends if not f.done()]

    def take_ends(self) -> list[Future[None]]:
        """Ends under way that nobody has waited for."""
        with self._lock:
            taken, self._ends = self._ends, []
        return taken
