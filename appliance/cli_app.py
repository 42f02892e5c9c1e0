"""Every verb, registered under its name; and the options that all share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from appliance import __version__, cli_bundle, cli_demo, cli_local, cli_run, cli_verbs
from appliance.cli_common import Options, out
from appliance.host.paths import default_paths

app = typer.Typer(
    name="hotcell",
    help="A shielded room for AI agents: sealed virtual machines, replication trials, scores from outside.",
    no_args_is_help=True,
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
        "doctor": cli_local.doctor,
        "build": cli_local.build,
        "demo": cli_demo.demo,
        "serve": cli_local.serve,
        "sweep": cli_local.sweep,
        "reindex": cli_local.reindex,
        "verify": cli_local.verify,
    },
    _WORK: {
        "run": cli_run.run,
        "trials": cli_verbs.trials,
        "show": cli_verbs.show_trial,
        "follow": cli_run.follow,
        "score": cli_verbs.score,
        "bundle": cli_bundle.bundle,
        "abort": cli_verbs.abort,
    },
    _LOOK: {
        "health": cli_verbs.health,
        "images": cli_verbs.images,
        "baselines": cli_verbs.baselines,
        "cells": cli_verbs.cells,
        "machines": cli_verbs.machines,
        "open": cli_verbs.open_cell,
        "close": cli_verbs.close_cell,
        "snapshot": cli_verbs.snapshot,
        "reset": cli_verbs.reset,
        "exec": cli_verbs.run_in_guest,
        "probe": cli_verbs.probe,
        "kill": cli_verbs.kill,
        "rearm": cli_verbs.rearm,
    },
}
for _group, _verbs in _VERBS.items():
    for _name, _verb in _verbs.items():
        app.command(_name, rich_help_panel=_group)(_verb)


def _version(asked: bool) -> None:
    if asked:
        out(f"hotcell {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    ctx: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(help="State of the laboratory. Default: $HOTCELL_HOME, else /var/lib/hotcell."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Images and downloads. Default: $HOTCELL_CACHE, else ~/.cache/hotcell."),
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
    named = os.environ.get("HOTCELL_CONFIG")
    ctx.obj = Options(
        default_paths(home, cache), config or (Path(named) if named else None), server, token_file
    )
