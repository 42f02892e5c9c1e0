"""The micro guest: a 1.5 KiB kernel that shows whether an accelerator really runs guests.

Made from ``microguest.S``, which says what it does and why; a unit test assembles that and compares.
It needs no file, no download and no image, so it works on a machine where nothing is built yet.
"""

from __future__ import annotations

import base64
from typing import Final

_HEADER_AT: Final = 0x1F1
_SIZE: Final = 1536
_CODE: Final = (
    "AQAAIAAAAAAAAAAAAFWq6y5IZHJTAwIAAAAAAAAAAP8BAAAAABAAAAAAAAAAAAAAAAAAAAAAAAAAAAD///9/+rBS5umMyIPoII7Y"
    "ZjHbicNmweMEZ2aNg3ACAABmo5ICZ2aNg5wCAABmo5YCZg8BFpACDyDADAEPIsBm/y6WAgAAAAAAAAAA//8AAACazwD//wAAAJLP"
    "AP//AAAAmq8AHwAAAAAAAAAAAAgAZrgQAI7YjsCO0LwAADAAsFDm6b8AACAAMcC5AAwAAPzzq8cFAAAgAAMQIADHBQAQIAADICAA"
    "vwAgIAC4gwAAALkAAgAAiQcFAAAgAIPHCOL0DyDgg8ggDyLguAAAIAAPIti5gAAAwA8yDQABAAAPMA8gwA0AAACADyLAsEfm6egA"
    "AAAAWAUKAAAAahhQy7BM5ulIjQWNAAAAvwAwIABmiYcAAgAAZseHAgIAABgAZseHBAIAAACOSMHoEGaJhwYCAABIx4cIAgAAAAAA"
    "AA8BHV0AAACwSebpMcAPorkALTEBSAHISMHAB//JdfWwV+bpsBHmILAg5iGwBOYhsAHmIbD+5iGwNOZDsADmQLAQ5kBNMf/79EmD"
    "/wpy+bBU5umwAeb09Ov9UEn/x7Ag5iBYSM//DwAwIA=="
)

# The letters it writes, in order, and what each shows.
STAGES: Final = {
    "R": "real mode",
    "P": "protected mode",
    "G": "paging",
    "L": "long mode",
    "I": "interrupt table",
    "W": "twenty million rounds of arithmetic",
    "T": "ten timer interrupts",
}
MARKER: Final = "".join(STAGES)
EXIT_STATUS: Final = 3  # QEMU's own status when the guest writes 1 to the debug-exit port


def image() -> bytes:
    """The kernel image, for QEMU's ``-kernel``."""
    return (bytes(_HEADER_AT) + base64.b64decode(_CODE)).ljust(_SIZE, b"\0")


def progress(letters: str) -> str:
    """How far it came, in words: what was reached last and what it was busy with."""
    reached = [stage for letter, stage in STAGES.items() if letter in letters]
    waiting = [stage for letter, stage in STAGES.items() if letter not in letters]
    if not reached:
        return "the guest did not run at all"
    return f"reached {reached[-1]}" + (f", then did not get through {waiting[0]}" if waiting else "")
