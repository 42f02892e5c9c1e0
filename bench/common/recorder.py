"""What the door to libvirt was asked, and when: the steps of a reset, without a change to what resets."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from appliance.cell import netlink
from appliance.cell.libvirt_door import Libvirt

_SNAPSHOT_S = 300.0
_NAME = re.compile("<name>(.*?)</name>")


class Event(NamedTuple):
    """One call and its monotonic times; ``subject`` is a domain's name, for ``plug`` a tap's."""

    kind: str
    subject: str
    detail: str
    began: float
    ended: float
    ok: bool


class RecordingLibvirt(Libvirt):
    """The appliance's own door, which notes every call, and the two calls that only a comparison needs."""

    def __init__(self, connection: Any, root: Path) -> None:
        super().__init__(connection, root)
        self.events: list[Event] = []

    @contextlib.contextmanager
    def noted(self, kind: str, subject: str, detail: str = "") -> Iterator[None]:
        """Note one call."""
        began, ok = time.monotonic(), False
        try:
            yield
            ok = True
        finally:
            self.events.append(Event(kind, subject, detail, began, time.monotonic(), ok))

    def start(self, xml: str, *, paused: bool) -> None:
        """As the appliance's."""
        found = _NAME.search(xml)
        with self.noted("start", found.group(1) if found else ""):
            super().start(xml, paused=paused)

    def resume(self, name: str) -> None:
        """As the appliance's."""
        with self.noted("resume", name):
            super().resume(name)

    def qmp(self, name: str, command: str, arguments: dict[str, object] | None = None) -> Any:
        """As the appliance's."""
        with self.noted("qmp", name, command):
            return super().qmp(name, command, arguments)

    def guest_agent(self, name: str, request: str, timeout_s: int) -> str:
        """As the appliance's."""
        with self.noted("qga", name, str(json.loads(request).get("execute"))):
            return super().guest_agent(name, request, timeout_s)

    def save_internally(self, name: str, label: str) -> None:
        """libvirt's own internal snapshot of a running domain: memory and device state go into its qcow2.

        Raises:
            LabError: libvirt refused.
        """
        xml = f"<domainsnapshot><name>{label}</name></domainsnapshot>"
        # Gigabytes of RAM are written into the image, while the machine waits.
        self._call(
            f"snapshot {name}",
            lambda: self._conn.lookupByName(name).snapshotCreateXML(xml, 0),
            _SNAPSHOT_S,
            name,
        )

    def revert_internally(self, name: str, label: str) -> None:
        """libvirt's own way back to it.

        Raises:
            LabError: libvirt refused.
        """

        def revert() -> None:
            domain = self._conn.lookupByName(name)
            domain.revertToSnapshot(domain.snapshotLookupByName(label, 0), 0)

        with self.noted("revert", name):
            self._call(f"revert {name}", revert, _SNAPSHOT_S, name)


@contextlib.contextmanager
def plugs_noted(door: RecordingLibvirt) -> Iterator[None]:
    """Note every plugging too, for the length of the block."""
    original = netlink.plug

    def plug(tap: str, bridge: str, mac: str) -> None:
        with door.noted("plug", tap, bridge):
            original(tap, bridge, mac)

    netlink.plug = plug
    try:
        yield
    finally:
        netlink.plug = original


class Milestones(NamedTuple):
    """Seconds from a request until each step of a reset had ended; None for a step that it did not take."""

    began: float | None
    started: float | None
    loaded: float | None
    resumed: float | None
    answered: float
    proved: float
    plugged: float
    ready: float
    returned: float


def milestones(
    events: Sequence[Event], domain: str, tap: str, requested: float, returned: float
) -> Milestones:
    """The steps of one reset, from what was noted. Pure.

    ``ready`` is the whole of what is asked for: the guest answered after it was resumed, and it is plugged.

    Raises:
        ValueError: nothing shows that the guest answered, or that it was plugged, before the call returned.
    """
    mine = [e for e in events if e.ok and e.began >= requested and e.ended <= returned]
    theirs = [e for e in mine if e.subject == domain]
    resumed = max((e.ended for e in theirs if e.kind == "resume"), default=None)
    answers = [e.ended for e in theirs if e.kind == "qga" and e.began >= (resumed or requested)]
    plugs = [e for e in mine if e.kind == "plug" and e.subject == tap]
    if not answers or not plugs:
        raise ValueError(f"{domain}: {len(answers)} answers and {len(plugs)} pluggings were noted")
    starts = [e for e in theirs if e.kind == "start"]
    loads = [e.ended for e in theirs if e.kind == "qmp" and (resumed is None or e.ended <= resumed)]
    plug = plugs[-1]

    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - requested

    return Milestones(
        began=since(starts[0].began if starts else None),
        started=since(starts[0].ended if starts else None),
        loaded=since(max(loads) if loads and starts else None),
        resumed=since(resumed),
        answered=answers[0] - requested,
        proved=plug.began - requested,
        plugged=plug.ended - requested,
        ready=max(answers[0], plug.ended) - requested,
        returned=returned - requested,
    )
