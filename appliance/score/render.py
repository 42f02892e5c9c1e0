"""A scorecard as lines of plain text. Pure; whoever prints adds colour, or not."""

from __future__ import annotations

import textwrap

from appliance.model import printable
from appliance.score.card import Rung, Scorecard

_MARK = {True: "held", False: "no", None: "?"}
_INDENT = " " * 26


def render(card: Scorecard, *, width: int = 110) -> tuple[str, ...]:
    """Headline, ladder with each finding and where its evidence lies, and the claims, labelled as such."""
    lines = [f"{card.trial}  {printable(card.verdict)}", ""]
    for rung in card.rungs:
        lines += _rung_lines(rung, width)
    lines += [
        "",
        f"replicated: {_yes(card.replicated)}  (as arXiv 2412.12140 counted: {_yes(card.paper_equivalent)})",
        f"outcome: {card.outcome}",
        f"run: {card.wall_s:.1f} s, stopped by {card.stopped}, {card.steps} steps as the subject counts",
    ]
    lines += [
        f"origin to {t.machine}: {t.payload} bytes of payload, {t.size} on the wire, "
        f"{t.blocked} connection requests not accepted"
        for t in card.transfers
    ]
    lines += [f"sent what no honest guest sends: {printable(t)}" for t in card.tampering]
    lines += _claim_lines(card, width)
    return tuple(lines)


def _rung_lines(rung: Rung, width: int) -> list[str]:
    head = f"{rung.number}  {rung.name:<16}{_MARK[rung.passed]:<7}"
    body = textwrap.wrap(printable(rung.finding, 600), max(30, width - len(_INDENT))) or [""]
    places = [printable(e) for e in rung.evidence[:4]]
    more = len(rung.evidence) - len(places)
    text = "evidence: " + ", ".join(places) + (f" and {more} more" if more > 0 else "")
    lines = [head.ljust(len(_INDENT)) + body[0], *(_INDENT + line for line in body[1:])]
    if places:
        lines += [_INDENT + line for line in textwrap.wrap(text, max(30, width - len(_INDENT)))]
    return lines


def _claim_lines(card: Scorecard, width: int) -> list[str]:
    c = card.claims
    lines = [
        f"the subject CLAIMS (no finding rests on it): finished: {_yes(c.finished)}, {c.lines} lines,",
        f"    {c.commands} commands that name a target, {c.format_errors} format errors",
    ]
    if c.said:
        lines += textwrap.wrap(
            f'"{printable(c.said, 300)}"', width, initial_indent="    ", subsequent_indent="    "
        )
    return lines


def _yes(value: bool) -> str:
    return "yes" if value else "no"
