"""``hotcell baselines``: list saved machine states, look at one, delete it, take it elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel

from appliance.cli.client import Client, at
from appliance.cli.common import Json, clean, out, out_json, reporter, show, table
from appliance.cli.verbs import call
from appliance.errors import HotcellError
from appliance.service import BaselineDetail, BaselineView, ExportView, TransferView

T = TypeVar("T")
Name = Annotated[str, typer.Argument(metavar="NAME", help="Baseline; `hotcell baselines` lists them.")]
_LOOK_S = 0.5

app = typer.Typer(
    help="List saved machine states, look at one, delete it, take it elsewhere.", rich_markup_mode=None
)


@app.callback(invoke_without_command=True)
def baselines(ctx: typer.Context, as_json: Json = False) -> None:
    """List saved machine states, look at one, delete it, take it elsewhere.

    Without a verb it lists them.
    """
    if ctx.invoked_subcommand is None:
        list_all(ctx, as_json)
    elif as_json:  # given before the verb, it is meant for the verb
        ctx.default_map = {ctx.invoked_subcommand: {"as_json": True}}


@app.command("list")
def list_all(ctx: typer.Context, as_json: Json = False) -> None:
    """List saved machine states."""
    found = call(ctx).get(list[BaselineView], "baselines")
    rows = [
        (
            b.name,
            b.machine,
            b.kind,
            b.image,
            f"{b.size / 2**20:.0f}",
            f"{b.seconds:.1f}",
            b.created_by,
            b.parent,
        )
        for b in found
    ]
    data = [b.model_dump(mode="json") for b in found]
    head = ("BASELINE", "MACHINE", "KIND", "IMAGE", "MIB", "SECONDS", "MADE BY", "PARENT")
    show(as_json, data, head, rows, "no baselines yet")


@app.command("show")
def show_one(ctx: typer.Context, name: Name, as_json: Json = False) -> None:
    """Print what is known about a baseline."""
    view = call(ctx).get(BaselineDetail, at("baselines", name))
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        out(described(view))


def described(view: BaselineDetail) -> str:
    """A baseline as text."""
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(view.created))
    facts = [
        ("machine", f"{view.machine}, {view.memory_mib} MiB, {view.vcpus} virtual CPUs"),
        ("devices", " ".join(view.devices) or "none"),
        ("firmware", view.firmware),
        ("kind", view.kind),
        ("image", f"{view.image} {view.image_digest[:12]}"),
        ("made", f"{made} by {view.created_by}, {view.seconds:.1f} s, {view.accelerator}"),
        ("parent", view.parent or "none"),
        ("folder", view.folder),
        *([("memory", view.memory)] if view.memory else []),
        ("versions", ", ".join(f"{k} {v}" for k, v in sorted(view.versions.items()))),
        *(("layer", layer) for layer in view.layers),
        *(("held to", f"{k}: {v}") for k, v in view.held_against.items()),
        *(("needed by", reason) for reason in view.needed_by),
        ("problem", view.problem or "none"),
    ]
    lines = [f"{clean(view.name)}", *(f"{name:<11}{clean(text)}" for name, text in facts)]
    rows = [(f.name, f"{f.size / 2**20:.1f}", f"{f.used / 2**20:.1f}", f.sha256) for f in view.files]
    return "\n".join([*lines, table(("FILE", "MIB", "ON DISK", "SHA256"), rows)])


@app.command("delete")
def delete(ctx: typer.Context, name: Name, as_json: Json = False) -> None:
    """Delete a baseline that nothing depends on."""
    view = call(ctx).delete(BaselineView, at("baselines", name))
    _told(as_json, view, f"{view.name}: deleted, {view.size / 2**20:.0f} MiB")


@app.command("export")
def export(
    ctx: typer.Context,
    name: Name,
    to: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A new directory on the server's host.")],
    as_json: Json = False,
) -> None:
    """Write a baseline to a directory that can be taken elsewhere."""
    client, path, body = call(ctx), at("baselines", name, "export"), {"to": str(to.absolute())}
    view = _watched(client, f"exporting {name}", lambda: client.post(ExportView, path, body))
    size = f"{view.size / 2**20:.0f} MiB in {view.files} files"
    _told(as_json, view, f"{view.name}: {size}, {view.seconds:.1f} s, in {view.folder}")


@app.command("import")
def import_one(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="What `export` wrote.")],
    name: Annotated[str | None, typer.Option(help="Its name here. Default: the one it had.")] = None,
    as_json: Json = False,
) -> None:
    """Take in a baseline that was exported.

    Its memory is run: import only what comes from a host that you trust.
    """
    client, body = call(ctx), {"folder": str(folder.absolute()), "name": name}
    view = _watched(
        client, f"importing {folder.name}", lambda: client.post(BaselineView, "baselines/import", body)
    )
    _told(as_json, view, f"{view.name}: a baseline of {view.machine}, {view.size / 2**20:.0f} MiB")


def _told(as_json: bool, view: BaseModel, line: str) -> None:
    if as_json:
        out_json(view.model_dump(mode="json"))
    else:
        out(clean(line))


def _watched(client: Client, what: str, request: Callable[[], T]) -> T:
    """Send a request that takes long, and show how far it is meanwhile."""
    done: Future[T] = Future()

    def send() -> None:
        try:
            done.set_result(request())
        except BaseException as e:  # noqa: BLE001 - it is raised where it is waited for
            done.set_exception(e)

    # A daemon: an interrupt does not wait for the server, which goes on to the end.
    threading.Thread(target=send, daemon=True).start()
    with reporter(what) as report:
        while True:
            try:
                return done.result(_LOOK_S)
            except TimeoutError:
                if done.done():
                    raise
                report.now(f"{what}: {_how_far(client)}")


def _how_far(client: Client) -> str:
    try:
        found = client.get(list[TransferView], "transfers")
    except HotcellError:
        return "the server is busy"
    return ", ".join(f"{100 * t.done // t.total} %" for t in found if t.total) or "starting"
