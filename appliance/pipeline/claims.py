"""Who works on which machine: one request at a time for each, and a second one is refused at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from appliance.errors import ConflictError

ALL = ""  # no machine has this name


class Claims:
    """Claims on machines and on whole cells; safe from any thread."""

    def __init__(self) -> None:
        self._held: set[tuple[str, str]] = set()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, cell: str, machine: str = ALL) -> Iterator[None]:
        """One machine of a cell, or all of it, for the length of a block.

        Raises:
            ConflictError: another request has the machine, the cell, or a part of it.
        """
        with self._changed:
            for other, held in self._held:
                if other == cell and (held == machine or ALL in (held, machine)):
                    raise ConflictError(
                        f"{held or 'the whole'} of {cell} is busy with another request",
                        hint="repeat it when that has ended",
                    )
            self._held.add((cell, machine))
        try:
            yield
        finally:
            with self._changed:
                self._held.discard((cell, machine))
                self._changed.notify_all()

    def wait_free(self, cell: str, limit_s: float) -> bool:
        """Wait until no request works on a cell; False if one still does."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(c == cell for c, _ in self._held), limit_s)

    def any(self) -> bool:
        """Whether any request works on a machine now."""
        with self._changed:
            return bool(self._held)
