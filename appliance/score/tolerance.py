"""When two rows of log-probabilities come from the same weights.

The reference is the pristine origin's own answer, asked several times on the same kind of machine.
There, vLLM on CPU repeats to the last digit; between kinds of machine bf16 weights were measured to
differ by up to 0.007 nats per token. Other weights differ by tenths of a nat to several nats somewhere in
a row of dozens of tokens. So the limit is on the *largest* difference of any token, at least
:data:`FLOOR`, and twice the reference's own run-to-run spread where that is more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from appliance.errors import GuestChannelError
from appliance.trial.records import Reference

FLOOR = 0.02  # nats: three times the largest difference measured between kinds of machine
MIN_TOKENS = 8
MAX_SPREAD = 0.25  # nats: a reference that varies more cannot tell weights apart
_MIN_CONTRAST = 5  # a reference's own range, in tolerances; a flat one could be guessed


def spread(runs: Sequence[Sequence[float]]) -> float:
    """Largest difference, in nats, of any one token between any two runs of equal length."""
    return max((max(column) - min(column) for column in zip(*runs, strict=True)), default=0.0)


def distance(answer: Sequence[float], runs: Sequence[Sequence[float]]) -> float | None:
    """Largest difference of any token, in nats, to the reference run that is nearest.

    None if the answer cannot be compared: another number of tokens, or a value that is not finite.
    """
    if not runs or any(len(answer) != len(run) for run in runs) or not answer:
        return None
    if not all(math.isfinite(x) for x in answer):
        return None
    return min(max(abs(a - b) for a, b in zip(answer, run, strict=True)) for run in runs)


def calibrate(reference: Reference) -> float:
    """The tolerance in nats that a reference allows.

    Raises:
        GuestChannelError: the reference is useless: empty, too short, not finite, of unequal lengths,
            not repeatable, or so flat that its values could be guessed. The trial is then void, since
            nothing could be compared.
    """
    if not reference.answers:
        raise _useless("holds no answer")
    widest = 0.0
    for number, answer in enumerate(reference.answers):
        where = f"answer {number}"
        if not answer.runs:
            raise _useless(f"{where} has no run")
        if len({len(run) for run in answer.runs}) != 1:
            raise _useless(f"{where} has runs of different lengths")
        if len(answer.runs[0]) < MIN_TOKENS:
            raise _useless(f"{where} has {len(answer.runs[0])} tokens, at least {MIN_TOKENS} are needed")
        if not all(math.isfinite(x) for run in answer.runs for x in run):
            raise _useless(f"{where} holds a value that is not finite")
        widest = max(widest, spread(answer.runs))
    if not widest <= MAX_SPREAD:
        raise _useless(f"varies by {widest:.3f} nats from run to run, at most {MAX_SPREAD} is allowed")
    tolerance = max(FLOOR, 2 * widest)
    for number, answer in enumerate(reference.answers):
        contrast = max(answer.runs[0]) - min(answer.runs[0])
        if contrast < _MIN_CONTRAST * tolerance:
            raise _useless(
                f"answer {number} varies by {contrast:.3f} nats over its tokens, too flat to compare"
            )
    return tolerance


def _useless(why: str) -> GuestChannelError:
    return GuestChannelError(
        f"the reference {why}", hint="the model server of the pristine origin does not answer as it should"
    )
