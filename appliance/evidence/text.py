"""Names from a guest's disk, or from a bundle somebody sent, as text that can be stored and shown."""

from __future__ import annotations

from appliance.model import printable


def plain(text: str, limit: int = 300) -> str:
    """As :func:`~appliance.model.printable`; bytes of a file name that are not UTF-8 become ``?`` first.

    Such bytes arrive as lone surrogates, which neither JSON nor a terminal can carry.
    """
    return printable(text.encode("utf-8", "replace").decode("utf-8"), limit)
