"""Verbs that work on this host without a server, or are the server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.cli.client import connect
from appliance.cli.common import (
    HOST,
    LAB,
    Json,
    Options,
    Reporter,
    clean,
    note,
    options,
    out,
    out_json,
    reporter,
    show,
)
from appliance.cli.reading import AtHome, trial_id
from appliance.cli.server import answers, die_with_parent
from appliance.errors import ConfigError, EvidenceError
from appliance.host.paths import Paths
from appliance.service import SweepView

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def doctor(ctx: typer.Context, as_json: Json = False) -> None:
    """Check what this host has and lacks.

    Exit status 3 if trials cannot run here.
    """
    from appliance.config import load_host_settings
    from appliance.host.doctor import doctor as examine
    from appliance.host.doctor import render

    with reporter("looking at this host") as report:
        report.now("looking at this host; the accelerator is tried by booting a micro guest")
        found = examine(options(ctx).paths, load_host_settings(options(ctx).config))
    if as_json:
        out_json({"fit": found.fit, **found.model_dump(mode="json")})
    else:
        out("\n".join(clean(line) for line in render(found)))
    if not found.fit:
        raise typer.Exit(HOST)


def build(
    ctx: typer.Context,
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]...", help="Recipes to build, in order.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Build every recipe.")] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="List recipes and what is built; build nothing.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune", help="Remove older images that no machine runs on and no baseline of this home needs."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Build images.

    Needs root and a package network; what is up to date is left alone. Progress goes to stderr; with --json
    stdout tells what was built and what was removed.
    """
    from appliance.build import find_image, list_recipes

    paths = options(ctx).paths
    known = list_recipes()
    if listing:
        found = {name: find_image(name, paths) for name in known}
        data = [
            {"recipe": n, "digest": i and i.digest, "folder": i and str(i.folder)} for n, i in found.items()
        ]
        rows = [(n, i and i.digest[:12], i and i.folder) for n, i in found.items()]
        show(as_json, data, ("RECIPE", "DIGEST", "FOLDER"), rows, "no recipes")
        return
    wanted = list(known) if everything else list(recipes or [])
    if not wanted and not prune:
        raise ConfigError("no recipe is named", hint=f"name some of {', '.join(known)}, or give --all")
    built = build_all(options(ctx), wanted) if wanted else []
    removed = _prune(paths) if prune else []
    if as_json:
        out_json({"built": built, "removed": removed})


def _prune(paths: Paths) -> list[dict[str, object]]:
    """Remove images of earlier inputs, with a line each on stderr; returns recipe, digest and folder of each."""
    from appliance.build import prune_images
    from appliance.cell.baseline import read_all

    needed = frozenset(b.machine.image.digest for b in read_all(paths))
    removed = prune_images(paths, needed)
    for image in removed:
        note(f"removed {image.recipe} {image.digest[:12]}")
    if not removed:
        note("nothing to remove")
    return [{"recipe": i.recipe, "digest": i.digest, "folder": str(i.folder)} for i in removed]


def build_all(o: Options, recipes: list[str]) -> list[dict[str, object]]:
    """Build recipes with progress on stderr; returns recipe, digest, folder and seconds of each."""
    from appliance.build import BuildOptions, build_image
    from appliance.config import load_host_settings

    sources = load_host_settings(o.config).build.apt_sources
    chosen = BuildOptions(apt_sources=sources.read_text() if sources else "")
    made: list[dict[str, object]] = []
    for recipe in recipes:
        began = time.monotonic()
        with reporter(recipe) as report:
            image = build_image(recipe, o.paths.make(), _Progress(recipe, report), options=chosen)
            seconds = time.monotonic() - began
            report.line(f"{recipe}: {image.digest[:12]} in {seconds:.1f} s")
        made.append(
            {
                "recipe": recipe,
                "digest": image.digest,
                "folder": str(image.folder),
                "seconds": round(seconds, 1),
            }
        )
    return made


class _Progress:
    """Report each new stage as a line, details only on a terminal."""

    def __init__(self, recipe: str, report: Reporter) -> None:
        self.recipe, self.report, self.stage = recipe, report, ""

    def __call__(self, stage: str, detail: str, fraction: float | None) -> None:
        share = f" {fraction:.0%}" if fraction is not None else ""
        text = f"{self.recipe}: {stage}{share} {clean(detail, 160)}".rstrip()
        if stage != self.stage:
            self.stage = stage
            self.report.line(text)
        self.report.now(text)


def serve(
    ctx: typer.Context,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: the settings, else 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one.")] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Listen on an address that others can reach.")
    ] = False,
    parent: Annotated[int | None, typer.Option(hidden=True, help="End when this process does.")] = None,
) -> None:
    """Run the laboratory and its API.

    Binds the API, seals the process, opens libvirt. Ends with Ctrl-C or SIGTERM.
    """
    if parent is not None:
        die_with_parent(parent)
    from api.server import serve as run_server
    from appliance.config import load_host_settings
    from appliance.pipeline import open_lab, seal_process

    o = options(ctx)
    settings = load_host_settings(o.config)
    run_server(
        lambda: open_lab(o.paths, settings),
        o.paths,
        settings.api.host if host is None else host,
        settings.api.port if port is None else port,
        seal=seal_process,
        allow_remote=allow_remote,
    )


def verify(
    ctx: typer.Context,
    bundle: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE",
            help="Directory of a bundle; or a trial of this home by its id, or `last` for the newest.",
        ),
    ],
    key: Annotated[
        Path | None, typer.Option(help="Public key (.pub) to trust. Default: this home's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle against its seal.

    Every file must be as sealed, nothing missing or added, the manifest signed by the key; else status 4.
    """
    from appliance.evidence.bundle import verify as check

    paths = options(ctx).paths
    folder = _bundle_folder(bundle, paths)
    report = check(folder, _trusted(key, paths))
    if as_json:
        out_json({"ok": report.ok, **report.model_dump(mode="json")})
    else:
        for fault in report.faults:
            out(f"{fault.fault}: {clean(fault.path, 300)}: {clean(fault.detail, 300)}")
        state = "intact" if report.ok else "NOT INTACT"
        name, signer = clean(report.trial or str(folder)), report.key[:16] or "-"
        out(f"{name}: {state}, {report.files} files, key {signer}")
    if not report.ok:
        raise typer.Exit(LAB)


def _bundle_folder(named: str, paths: Paths) -> Path:
    """The directory that BUNDLE means. A path wins over an id of the same spelling."""
    given = Path(named)
    try:
        if given.is_dir():
            return given
        if given.name == named and not given.exists():
            found = paths.bundles / trial_id(AtHome(paths), named)
            if found.is_dir():
                return found
        what = (
            "is a file, not a bundle's directory" if given.exists() else "no such directory or sealed trial"
        )
    except OSError as e:
        what = f"cannot be read: {e.strerror}"
    raise ConfigError(
        f"{named}: {what}",
        hint="name a bundle's directory (unpack a .tar first), or a sealed trial that `hotcell trials` lists",
    )


def _trusted(key: Path | None, paths: Paths) -> Ed25519PublicKey:
    """The key that bundles are held against; a wrong one is the caller's to mend."""
    from appliance.evidence.keys import public_key, public_path

    path = key or public_path(paths.signing_key)
    if key is None and not path.exists():
        raise ConfigError(
            f"{paths.home} has sealed nothing yet: it has no {path.name}",
            hint="name the right home with --home; `hotcell verify --key FILE` takes another home's .pub file",
        )
    beside = public_path(path)
    whose = str(beside) if beside.exists() else "that of the home that sealed the bundle"
    try:
        return public_key(path)
    except EvidenceError as e:
        raise ConfigError(e.message, hint=f"name the .pub file: {whose}") from e


def sweep(
    ctx: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run/--yes", help="Only list (default), or remove with --yes.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Find what a killed server left behind.

    Goes by the ledger, never by name patterns. Removes what it finds only with --yes.
    """
    o = options(ctx)
    # A server that was named may be of another host: its silence is no reason to sweep this home.
    if o.server is not None or answers(o):
        with connect(o.paths, o.server, o.token_file) as client:
            view = client.post(SweepView, "sweep", {"dry_run": dry_run})
    else:
        from appliance.pipeline import local_sweep

        view = local_sweep(o.paths, dry_run)
    rows = [(s.kind, s.name, s.outcome, s.detail) for s in view.strays]
    data = view.model_dump(mode="json")
    show(as_json, data, ("KIND", "NAME", "OUTCOME", "DETAIL"), rows, "no strays")
    if dry_run and view.strays and not as_json:
        note("nothing was removed; `hotcell sweep --yes` does")
    if any(s.outcome == "failed" for s in view.strays):
        raise typer.Exit(LAB)


def reindex(ctx: typer.Context, as_json: Json = False) -> None:
    """Rebuild the database from the bundles.

    Each bundle is verified first; exit status 4 if one had to be left out.
    """
    from appliance.store.database import Store
    from appliance.store.reindex import reindex as rebuild

    paths = options(ctx).paths
    trusted = _trusted(None, paths)
    report = rebuild(Store(paths.make().database), paths.bundles, trusted)
    if as_json:
        out_json(report.model_dump(mode="json"))
    else:
        out(f"{report.indexed} bundles indexed")
        for skipped in report.skipped:
            note(f"left out: {clean(skipped.bundle, 100)}: {clean(skipped.reason, 300)}")
    if report.skipped:
        raise typer.Exit(LAB)
