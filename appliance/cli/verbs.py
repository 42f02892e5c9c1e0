"""Verbs that ask the server one thing and print the answer."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from appliance.cli.client import Client, at, connect
from appliance.cli.common import (
    LAB,
    OTHER,
    Cell,
    Json,
    Machine,
    Trial,
    clean,
    note,
    options,
    out,
    out_json,
    show,
)
from appliance.cli.reading import reader, trial_id
from appliance.cli.render import outcome, trial_table, trial_text
from appliance.errors import ConfigError, PrerequisiteError
from appliance.model import MAX_PAGE, TrialState
from appliance.service import (
    BaselineKind,
    BaselineView,
    CellRequest,
    CellView,
    ExecView,
    HealthView,
    ImageView,
    KillView,
    MachineView,
    ProbeView,
    ResetView,
    TrialView,
)


def call(ctx: typer.Context) -> Client:
    """A client that is closed when the verb ends."""
    o = options(ctx)
    return ctx.with_resource(connect(o.paths, o.server, o.token_file))


def health(ctx: typer.Context, as_json: Json = False) -> None:
    """Say whether the server can run trials.

    Exit status 4 if not.
    """
    view = call(ctx).get(HealthView, "health")
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        for name, value in (
            ("ok", "yes" if view.ok else "no"),
            ("seal", f"{'sealed' if view.seal.sealed else 'NOT SEALED'}: {clean(view.seal.detail)}"),
            ("warden", "watches" if view.warden else "GONE"),
            ("accepting", "yes" if view.accepting else "no: killed; `hotcell rearm` when it is safe"),
            ("accelerator", view.accelerator),
            ("trials", f"{view.trials_running} running, {view.queue} waiting{_why(view)}"),
            ("server", f"{view.version}, up {view.uptime_s:.0f} s, {view.footprint.rss / 2**20:.0f} MiB"),
        ):
            out(f"{name:<13}{value}")
    if not view.ok:
        raise typer.Exit(LAB)


def _why(view: HealthView) -> str:
    return f": {clean(view.waiting)}" if view.waiting else ""


def images(ctx: typer.Context, as_json: Json = False) -> None:
    """List recipes and what is built of them."""
    found = call(ctx).get(list[ImageView], "images")
    rows = [(i.recipe, i.digest and i.digest[:12], f"{i.size / 2**20:.0f}") for i in found]
    data = [i.model_dump(mode="json") for i in found]
    show(as_json, data, ("RECIPE", "DIGEST", "MIB"), rows, "no recipes")


def cells(ctx: typer.Context, as_json: Json = False) -> None:
    """List open cells."""
    found = call(ctx).get(list[CellView], "cells")
    rows = [(c.id, c.state, c.trial, " ".join(c.machines)) for c in found]
    data = [c.model_dump(mode="json") for c in found]
    show(as_json, data, ("CELL", "STATE", "TRIAL", "MACHINES"), rows, "no open cells")


def machines(ctx: typer.Context, as_json: Json = False) -> None:
    """List the machines of open cells."""
    found = call(ctx).get(list[MachineView], "machines")
    rows = [(m.cell, m.name, m.role, m.state, m.image, m.address, m.link_up, m.pid) for m in found]
    data = [m.model_dump(mode="json") for m in found]
    head = ("CELL", "MACHINE", "ROLE", "STATE", "IMAGE", "ADDRESS", "LINK", "PID")
    show(as_json, data, head, rows, "no machines")


def open_cell(
    ctx: typer.Context,
    policy: Annotated[str, typer.Option(help="Policy of the cell.")] = "sealed",
    targets: Annotated[int, typer.Option(min=1, max=8, help="Number of targets.")] = 1,
    as_json: Json = False,
) -> None:
    """Open a cell outside of trials.

    Look around in it with `exec` and `probe`, then `close` it.
    """
    view = call(ctx).post(CellView, "cells", CellRequest(policy=policy, targets=targets))
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        out(f"{view.id}: {view.state}, machines {' '.join(view.machines)}")


def close_cell(ctx: typer.Context, cell: Cell, as_json: Json = False) -> None:
    """Close a cell opened by hand.

    Stops its machines and removes all that is theirs.
    """
    view = call(ctx).delete(CellView, at("cells", cell))
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        out(f"{view.id}: {view.state}")


def snapshot(
    ctx: typer.Context,
    cell: Cell,
    machine: Machine,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new baseline.")],
    kind: Annotated[
        BaselineKind | None,
        typer.Option(help="ram or disk; a disk baseline shuts the guest down. Default: as its baseline."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Save a machine's present state as a baseline."""
    body = {"name": name, "kind": kind}
    view = call(ctx).post(BaselineView, at("cells", cell, "machines", machine, "snapshot"), body)
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        size = f"{view.size / 2**20:.0f} MiB"
        out(f"baseline {clean(view.name)} of {view.machine}: {size}, {view.seconds:.1f} s")


def reset(
    ctx: typer.Context,
    cell: Cell,
    machine: Annotated[
        str | None, typer.Argument(help="Its name; without one, all machines of the cell as a group.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another baseline of this machine to put it back to.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put machines back to their baselines.

    Prints the proof, fact by fact. Exit status 4 if a machine is not proved.
    """
    if machine is None:
        if baseline is not None:
            raise ConfigError("--baseline is for one machine", hint="name the machine too")
        views = call(ctx).post(list[ResetView], at("cells", cell, "reset"))
        data: object = [v.model_dump(mode="json") for v in views]
    else:
        one = at("cells", cell, "machines", machine, "reset")
        views = [call(ctx).post(ResetView, one, {"baseline": baseline})]
        data = views[0].model_dump(mode="json")
    rows = [(v.machine, c.name, c.passed, c.expected, c.found) for v in views for c in v.proof.checks]
    show(as_json, data, ("MACHINE", "FACT", "HOLDS", "EXPECTED", "FOUND"), rows, "no facts")
    if not as_json:
        for view in views:
            out(_reset_line(view))
    if not all(v.proved for v in views):
        raise typer.Exit(LAB)


def _reset_line(view: ResetView) -> str:
    state = "proved clean" if view.proved else "NOT PROVED, withheld"
    way = "a machine that stood by" if view.standby else f"restored now ({clean(view.direct_because)})"
    return f"{view.machine}: {state}; {way}; answered after {view.answered_s:.3f} s, ready after {view.seconds:.3f} s"


def run_in_guest(
    ctx: typer.Context,
    cell: Cell,
    machine: Machine,
    argv: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="The command; put -- before it.")],
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds it may take.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Run a command in a guest.

    No shell is added. Its exit status becomes ours.
    """
    body = {"argv": argv, "timeout_s": timeout}
    view = call(ctx).post(ExecView, at("cells", cell, "machines", machine, "exec"), body)
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        if view.stdout:
            out(clean(view.stdout.rstrip("\n"), 1 << 20))
        if view.stderr:
            note(clean(view.stderr.rstrip("\n"), 1 << 20))
        if view.truncated:
            note("(output was cut)")
    if view.rc is None:
        note(
            f"error: {clean(shlex.join(argv), 200)} did not end within {timeout:g} s; "
            f"it goes on running in {machine} as process {view.running_pid}\n"
            f"  what to do: give it more time with --timeout, or `hotcell reset {cell} {machine}`"
        )
    raise typer.Exit(OTHER if view.rc is None else view.rc & 0xFF)


def probe(ctx: typer.Context, cell: Cell, machine: Machine, as_json: Json = False) -> None:
    """Ask what answers on a machine.

    The prompt carries a fresh nonce.
    """
    view = call(ctx).post(ProbeView, at("cells", cell, "machines", machine, "probe"))
    if as_json:
        out_json(view.model_dump(mode="json"))
        return
    ports = " ".join(str(p) for p in view.listeners) or "none"
    out(f"model    {'answers' if view.model else 'no'}")
    out(f"agent    {'answers' if view.agent else 'no'}")
    out(f"ports    {ports}")
    if view.problem:
        out(f"problem  {clean(view.problem)}")


def trials(
    ctx: typer.Context,
    state: Annotated[TrialState | None, typer.Option(help="Only trials in this state.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only trials of this subject.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_PAGE, help="At most this many.")] = 20,
    offset: Annotated[int, typer.Option(min=0, help="Skip this many.")] = 0,
    as_json: Json = False,
) -> None:
    """List trials, newest first."""
    page = reader(ctx).trials(state, subject, limit, offset)
    if as_json:
        out_json(page.model_dump(mode="json"))
        return
    out(trial_table(page.items) if page.items else "no trials")
    if page.total > len(page.items):
        note(f"{len(page.items)} of {page.total}; --limit and --offset show others")


def show_trial(ctx: typer.Context, trial: Trial, as_json: Json = False) -> None:
    """Print what is known about a trial."""
    source = reader(ctx)
    view = source.trial(trial_id(source, trial))
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        out(trial_text(view))


def score(ctx: typer.Context, trial: Trial, as_json: Json = False) -> None:
    """Print a trial's ladder.

    Each rung with the evidence it rests on; claims apart.
    """
    source = reader(ctx)
    card = source.score(trial_id(source, trial))
    if as_json:
        out_json(card)
    else:
        out(ladder(card))


def ladder(card: dict[str, object]) -> str:
    """A scorecard as text."""
    from appliance.score.card import Scorecard
    from appliance.score.render import render

    return "\n".join(render(Scorecard.model_validate(card)))


def abort(ctx: typer.Context, trial: Trial, as_json: Json = False) -> None:
    """Stop a trial."""
    client = call(ctx)
    view = client.post(TrialView, at("trials", client.trial_id(trial), "abort"))
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        out(outcome(view))


def kill(
    ctx: typer.Context,
    reason: Annotated[str, typer.Option(help="Why; it is written into the journals.")] = "hotcell kill",
    as_json: Json = False,
) -> None:
    """Cut all links and stop all machines.

    Ends all trials; nothing starts again before `rearm`.
    """
    try:
        view = call(ctx).post(KillView, "kill", {"reason": reason})
    except PrerequisiteError as e:
        if options(ctx).server is not None:
            raise
        raise PrerequisiteError(
            f"{e.message}; so there is nothing that could be told to stop",
            hint="`hotcell sweep --yes` stops and removes whatever a killed server left",
        ) from e
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        out(
            f"cut {view.links_cut} links, stopped {view.machines_stopped} machines, "
            f"ended {view.trials_ended} trials in {view.seconds:.1f} s"
        )
        for problem in view.problems:
            note(f"error: {clean(problem)}")
    if view.problems:
        raise typer.Exit(LAB)


def rearm(ctx: typer.Context, as_json: Json = False) -> None:
    """Accept trials again after `kill`."""
    view = call(ctx).post(HealthView, "rearm")
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        out("accepting trials" if view.accepting else "still not accepting trials")
    if not view.accepting:
        raise typer.Exit(LAB)
