"""Every verb, registered under its name; and the options that all share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from appliance import __version__
from appliance.cli import baselines, bundle, demo, local, run, verbs
from appliance.cli.common import Options, out
from appliance.host.paths import default_paths

app = typer.Typer(
    name="hotcell",
    help="A shielded room for AI agents: sealed virtual machines, replication trials, scores from outside.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_WORK = "Trials"
_LOOK = "Machines"
_HOST = "This host"
_VERBS: dict[str, dict[str, Callable[..., None]]] = {
    _HOST: {
        "doctor": local.doctor,
        "build": local.build,
        "demo": demo.demo,
        "serve": local.serve,
        "sweep": local.sweep,
        "reindex": local.reindex,
        "verify": local.verify,
    },
    _WORK: {
        "run": run.run,
        "trials": verbs.trials,
        "show": verbs.show_trial,
        "follow": run.follow,
        "score": verbs.score,
        "bundle": bundle.bundle,
        "abort": verbs.abort,
    },
    _LOOK: {
        "health": verbs.health,
        "images": verbs.images,
        "cells": verbs.cells,
        "machines": verbs.machines,
        "open": verbs.open_cell,
        "close": verbs.close_cell,
        "snapshot": verbs.snapshot,
        "reset": verbs.reset,
        "exec": verbs.run_in_guest,
        "probe": verbs.probe,
        "kill": verbs.kill,
        "rearm": verbs.rearm,
    },
}
for _group, _verbs in _VERBS.items():
    for _name, _verb in _verbs.items():
        app.command(_name, rich_help_panel=_group)(_verb)


app.add_typer(baselines.app, name="baselines", rich_help_panel=_LOOK)


def _version(asked: bool) -> None:
    if asked:
        out(f"hotcell {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _global(
    ctx: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(help="State of the laboratory. Default: $HOTCELL_HOME, else /var/lib/hotcell."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Images and downloads. Default: $HOTCELL_CACHE, else $XDG_CACHE_HOME/hotcell, "
            "else ~/.cache/hotcell."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Settings file. Default: $HOTCELL_CONFIG, else /etc/hotcell/hotcell.toml."),
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask this server instead of the home's own.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="Token for --server. Default: the home's.")] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version
    if ctx.invoked_subcommand is None:
        out(ctx.get_help())
        raise typer.Exit
    ctx.obj = Options(default_paths(home, cache), config, server, token_file)
