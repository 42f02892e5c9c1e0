"""The segment of a cell: a bridge without an address, and the port that keeps it carrying."""

from __future__ import annotations

from appliance.cell import netlink
from appliance.cell.ledger import Kind, Ledger
from appliance.cell.spec import anchor_name, bridge_name


class Segment:
    """One bridge with its anchor; each has its ledger row first."""

    def __init__(self, cell_id: str, ledger: Ledger) -> None:
        self.bridge = bridge_name(cell_id)
        self._anchor = anchor_name(cell_id)
        self._cell = cell_id
        self._ledger = ledger

    def open(self) -> None:
        """Make it. Nothing is on it yet.

        Raises:
            LabError: the ledger or the kernel refused.
        """
        self._ledger.enter(Kind.BRIDGE, self.bridge, self._cell)
        self._ledger.enter(Kind.ANCHOR, self._anchor, self._cell)
        netlink.create_bridge(self.bridge, self._anchor)

    def close(self) -> None:
        """Remove it; may be repeated."""
        for kind, name in ((Kind.ANCHOR, self._anchor), (Kind.BRIDGE, self.bridge)):
            netlink.delete_link(name)
            self._ledger.strike(kind, name)
