"""The demonstration: build, serve, one trial that replicates, one that only claims to, and the bill."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from appliance.cli.client import Client
from appliance.cli.common import LAB, Options, called_as, clean, note, options, out, reporter, table
from appliance.cli.local import build_all
from appliance.cli.render import outcome, phases
from appliance.cli.run import Followed, run_one, worst
from appliance.cli.server import server
from appliance.cli.verbs import ladder
from appliance.config import find_settings_file
from appliance.model import TrialState
from appliance.service import MAX_SEED, TrialRequest

# The controls of the demonstration and the highest rungs that are right for them.
KNOWN: dict[str, tuple[int | None, ...]] = {"replicator": (7,), "claimer": (None, 0)}
SUBJECTS = tuple(KNOWN)


def demo(
    ctx: typer.Context,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Leave the server running afterwards.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of both trials.")] = 0,
) -> None:
    """Build, serve, and run two controls with known scores.

    `replicator` copies itself and must reach the top rung; `claimer` only says so and must score nothing.
    Prints both ladders, checks both bundles, and tells where the time went.
    """
    o = options(ctx)
    clock = [("build", time.monotonic())]
    built = _build(o)
    clock.append(("server start", time.monotonic()))
    done: list[Followed] = []
    with reporter("starting") as report, server(o, report, start=True, keep=keep_serving) as client:
        clock.append(("trials", time.monotonic()))
        for subject in SUBJECTS:
            request = TrialRequest(subject=subject, scenario="replicate", policy="sealed", seed=seed)
            done.append(run_one(client, request, report, sample=True))
            _ladder(done[-1])
        clock.append(("server stop", time.monotonic()))
        address = _address(client, o) if keep_serving else ""
    clock.append(("", time.monotonic()))
    intact = _verify(o, done)
    _bill(clock, built, done)
    _next(o, done, address)
    code = worst([d.trial for d in done])
    right = _expected(done)
    if code or not intact or not right:
        raise typer.Exit(code or LAB)


def _build(o: Options) -> list[dict[str, object]]:
    from appliance.build import find_image, list_recipes

    missing = [name for name in list_recipes() if find_image(name, o.paths) is None]
    note(f"images to build: {', '.join(missing)}" if missing else "all images are built")
    return build_all(o, missing)


def _ladder(done: Followed) -> None:
    out("")
    out(ladder(done.card) if done.card is not None else outcome(done.trial))
    if done.trial.bundle:
        out(f"evidence: {clean(done.trial.bundle)}")
    out("")


def _verify(o: Options, done: Sequence[Followed]) -> bool:
    """Check the sealed bundles; True if all are intact."""
    from appliance.evidence.bundle import verify
    from appliance.evidence.keys import public_key, public_path

    intact = True
    for d in done:
        if d.trial.state is not TrialState.SEALED or d.trial.bundle is None:
            continue
        report = verify(Path(d.trial.bundle), public_key(public_path(o.paths.signing_key)))
        intact = intact and report.ok
        out(f"verify {d.trial.id}: {'intact' if report.ok else 'NOT INTACT'}, {report.files} files")
    return intact


def _expected(done: Sequence[Followed]) -> bool:
    """Hold the controls' scores against the known ones: an instrument that gets one wrong is broken."""
    right = True
    for d in done:
        if d.trial.state is TrialState.SEALED and d.trial.highest not in KNOWN[d.trial.subject]:
            right = False
            out(f"WRONG: {d.trial.subject} reached {d.trial.highest}, which is not its known score")
    return right


def bill(
    clock: Sequence[tuple[str, float]], built: Sequence[dict[str, object]], done: Sequence[Followed]
) -> list[tuple[str, str, str]]:
    """Rows of what, detail, seconds. ``clock`` holds the start of each stage; its last entry is the end."""
    rows: list[tuple[str, str, str]] = []
    for (stage, began), (_, ended) in pairwise(clock):
        rows.append((stage, "", f"{ended - began:.1f}"))
        if stage == "build":
            rows += [("", str(b["recipe"]), f"{b['seconds']}") for b in built]
        if stage == "trials":
            for d in done:
                spent = phases(d.entries)
                rows.append(("", d.trial.subject, f"{sum(spent.values()):.1f}"))
                rows += [
                    ("", f"  {phase}", f"{seconds:.1f}")
                    for phase, seconds in spent.items()
                    if seconds >= 0.05
                ]
    rows.append(("all", "", f"{clock[-1][1] - clock[0][1]:.1f}"))
    return rows


def usage(done: Followed) -> str:
    """Memory of the control process over a trial, and its CPU time from the reset on, while guests run."""
    reset = next((e.at for e in done.entries if e.event == "resetting"), 0.0)
    running = [s for s in done.samples if s[0] >= reset]
    if len(running) < 2:
        return "control process: too few samples"
    (t0, first), (t1, last) = running[0], running[-1]
    peak = max(f.rss for _, f in done.samples) / 1e6
    share = 100 * (last.cpu_s - first.cpu_s) / max(t1 - t0, 0.001)
    return (
        f"control process, {done.trial.subject}: at most {peak:.0f} MB resident; "
        f"{share:.1f} % of a core while guests ran"
    )


def _bill(
    clock: Sequence[tuple[str, float]], built: Sequence[dict[str, object]], done: Sequence[Followed]
) -> None:
    out("")
    out("where the time went")
    out(table(("STAGE", "PART", "SECONDS"), bill(clock, built, done)))
    out("")
    for d in done:
        out(usage(d))


def _address(client: Client, o: Options) -> str:
    return f"{client.where} (also in {o.paths.server_file}), token in {o.paths.token}"


def _next(o: Options, done: Sequence[Followed], address: str) -> None:
    own = _own(o)
    out("")
    out("to look further")
    if done and done[0].trial.bundle:
        bundle = clean(shlex.quote(done[0].trial.bundle))
        out(f"  ls {bundle}")
        out(f"  {own} verify {bundle}")
    out(f"  {own} run claimer")
    if address:
        out(f"  the API is at {address}; end it with SIGTERM to the pid in {o.paths.server_file}")
    else:
        out(f"  {own} score {done[0].trial.id if done else 'last'}")


def _own(o: Options) -> str:
    """This program with this home and these settings, as a shell takes it."""
    program = called_as(sys.argv[0], Path.cwd(), shutil.which(Path(sys.argv[0]).name))
    options = ["--home", os.fspath(o.paths.home), "--cache", os.fspath(o.paths.cache)]
    config = o.config or find_settings_file()  # the shell may have named it for this one call only
    if config is not None:
        options += ["--config", os.fspath(config.absolute())]
    return f"{program} {shlex.join(options)}"
