"""Run trials and follow them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, get_args

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from appliance.cli.client import Client, at
from appliance.cli.common import (
    INTERRUPTED,
    LAB,
    OTHER,
    Json,
    Options,
    Reporter,
    Trial,
    note,
    options,
    out,
    out_json,
    pairs,
    reporter,
)
from appliance.cli.render import journal_line, outcome
from appliance.cli.server import server
from appliance.cli.verbs import ladder
from appliance.errors import ConfigError, ConflictError, HotcellError, LabError
from appliance.model import TrialState
from appliance.service import (
    MAX_SEED,
    FootprintView,
    HealthView,
    LimitOverrides,
    TrialRequest,
    TrialView,
)
from appliance.trial.records import JournalEntry

_SAMPLE_S = 5.0


@dataclass
class Followed:
    """A trial that ended, its journal, its scorecard, and what the control process used meanwhile."""

    trial: TrialView
    entries: list[JournalEntry] = field(default_factory=list)
    samples: list[tuple[float, FootprintView]] = field(default_factory=list)
    card: dict[str, object] | None = None


def limits_of(values: Sequence[str]) -> LimitOverrides:
    """``--limit`` options as overrides.

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
    """
    given = pairs(values, tuple(LimitOverrides.model_fields), "--limit")
    try:
        return LimitOverrides.model_validate(given)
    except ValidationError as e:
        key = str(e.errors()[0]["loc"][0])
        raise ConfigError(
            f"--limit {key}={given[key]}: allowed is {allowed(LimitOverrides.model_fields[key])}",
            hint="give a value within that range, or leave it out: then the scenario's own limit holds",
        ) from e


def allowed(field: FieldInfo) -> str:
    """What a number's field takes, in words. Pure."""
    whole = int in (field.annotation, *get_args(field.annotation))
    bounds = [
        f"{word} {getattr(bound, name)}"
        for bound in field.metadata
        for name, word in (("gt", "above"), ("ge", "at least"), ("le", "at most"))
        if hasattr(bound, name)
    ]
    return f"a {'whole ' if whole else ''}number {', '.join(bounds)}"


def watch(
    client: Client, trial: str, report: Reporter, *, sample: bool = False, began: float | None = None
) -> Followed:
    """Follow a trial to its end, a line an entry."""
    entries: list[JournalEntry] = []
    samples: list[tuple[float, FootprintView]] = []
    due = time.monotonic()
    for item in client.follow(trial):
        if isinstance(item, TrialView):
            return Followed(item, entries, samples)
        if item is not None:
            began = item.at if began is None else began
            entries.append(item)
            line = journal_line(item, began)
            report.line(line)
            report.now(f"{trial}  {line.strip()}")
        if sample and time.monotonic() >= due:
            samples.append((time.time(), client.get(HealthView, "health").footprint))
            due = time.monotonic() + _SAMPLE_S
    raise LabError(f"following {trial} ended without its end", hint=f"`hotcell show {trial}`")


def run_one(client: Client, request: TrialRequest, report: Reporter, *, sample: bool = False) -> Followed:
    """Create a trial and follow it; an interruption aborts it first. The key makes a lost answer harmless."""
    keyed = request.model_copy(update={"key": f"cli-{uuid.uuid4()}"})
    trial = client.post(TrialView, "trials", keyed)
    report.line(
        f"{trial.id}: {request.subject} in {request.scenario} under {request.policy}, seed {request.seed}"
    )
    try:
        done = watch(client, trial.id, report, sample=sample)
    except KeyboardInterrupt:
        report.line(f"interrupted: aborting {trial.id} (Ctrl-C again to leave at once)")
        _abort(client, trial.id, report)
        raise
    if done.trial.state is TrialState.SEALED:
        done.card = client.get(dict[str, object], at("trials", trial.id, "score"))
    return done


def _abort(client: Client, trial: str, report: Reporter) -> None:
    try:
        client.post(TrialView, at("trials", trial, "abort"))
        report.line(outcome(watch(client, trial, Reporter(None)).trial))
    except ConflictError:
        report.line(f"{trial} had ended already")
    except HotcellError as e:
        report.line(f"could not abort {trial}: {e.message}")


def worst(trials: Sequence[TrialView]) -> int:
    """Exit status for some trials: 4 if any is void, 1 if any was aborted, else 0."""
    states = {t.state for t in trials}
    if TrialState.VOID in states:
        return LAB
    return OTHER if TrialState.ABORTED in states else 0


def run(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="Subject, such as replicator.")],
    scenario: Annotated[str, typer.Option(help="What the subject is asked.")] = "replicate",
    policy: Annotated[str, typer.Option(help="Named set of containment measures.")] = "sealed",
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first trial; each next one adds 1.")
    ] = 0,
    trials: Annotated[int, typer.Option(min=1, max=10_000, help="How many trials, one after the other.")] = 1,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Override wall_s, steps, disk_mb, lasting_s, probes or settle_s."
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Start a server for the job if none runs.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Run trials and print their ladders.

    Exit status 0: all sealed; 4: one is void; 1: one was aborted. Ctrl-C aborts the trial first.
    """
    overrides = limits_of(limit or [])
    requests = [_request(subject, scenario, policy, seed + i, overrides) for i in range(trials)]
    done = _all(options(ctx), requests, start=serve, shown=None if as_json else _print)
    if as_json:
        out_json([{"trial": d.trial.model_dump(mode="json"), "score": d.card} for d in done])
    code = worst([d.trial for d in done])
    if code:
        raise typer.Exit(code)


def _request(subject: str, scenario: str, policy: str, seed: int, limits: LimitOverrides) -> TrialRequest:
    try:
        return TrialRequest(subject=subject, scenario=scenario, policy=policy, seed=seed, limits=limits)
    except ValidationError as e:
        first = e.errors()[0]
        name, found = str(first["loc"][0]), first["input"]
        if name == "seed":
            raise ConfigError(
                f"seed {found}: allowed is {allowed(TrialRequest.model_fields['seed'])}",
                hint="each next trial's seed is 1 higher: give a lower --seed, or fewer --trials",
            ) from e
        raise ConfigError(
            f"{name} {found!r} is not a name",
            hint="names are lower case letters, digits and hyphens, at most 40",
        ) from e


def _all(
    o: Options, requests: Sequence[TrialRequest], *, start: bool, shown: Callable[[Followed], None] | None
) -> list[Followed]:
    done: list[Followed] = []
    first = requests[0]  # the others differ from it in their seed only
    with reporter("connecting") as report, server(o, report, start=start, wanted=first) as client:
        for request in requests:
            done.append(run_one(client, request, report))
            if shown is not None:
                shown(done[-1])
    return done


def _print(done: Followed) -> None:
    out("")
    out(ladder(done.card) if done.card is not None else outcome(done.trial))


def follow(ctx: typer.Context, trial: Trial, as_json: Json = False) -> None:
    """Follow a trial's journal.

    Leaving with Ctrl-C does not stop the trial.
    """
    from appliance.cli.client import connect

    o = options(ctx)
    with connect(o.paths, o.server, o.token_file) as client:
        name = client.trial_id(trial)
        began: float | None = None
        try:
            for item in client.follow(name):
                if isinstance(item, TrialView):
                    note(outcome(item))
                    ctx.exit(worst([item]))
                if item is None:
                    continue
                began = item.at if began is None else began
                out(item.model_dump_json() if as_json else journal_line(item, began))
        except KeyboardInterrupt as e:
            note(f"{name} goes on; `hotcell abort {name}` stops it")
            raise typer.Exit(INTERRUPTED) from e
