"""Reading trials: from the server, or from the home's own files if none runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

from appliance.cli.client import Client, arriving, at, connect
from appliance.cli.common import note, options
from appliance.errors import ConfigError, PrerequisiteError, UserError
from appliance.host.paths import Paths
from appliance.model import TrialState
from appliance.service import HealthView, TrialPage, TrialView

if TYPE_CHECKING:
    from appliance.pipeline.archive import Archive


class Reader(Protocol):
    """What can be asked about trials, whoever answers."""

    def trials(
        self, state: TrialState | None = None, subject: str | None = None, limit: int = 1, offset: int = 0
    ) -> TrialPage:
        """Trials, newest first."""

    def trial(self, trial: str) -> TrialView:
        """One trial."""

    def score(self, trial: str) -> dict[str, object]:
        """Its scorecard."""

    def fetch(self, trial: str, target: Path) -> None:
        """Its bundle as a tar file, which appears only when complete."""


class Asked:
    """The running server's answers."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def trials(
        self, state: TrialState | None = None, subject: str | None = None, limit: int = 1, offset: int = 0
    ) -> TrialPage:
        """See :class:`Reader`."""
        return self._client.get(
            TrialPage, "trials", state=state and state.value, subject=subject, limit=limit, offset=offset
        )

    def trial(self, trial: str) -> TrialView:
        """See :class:`Reader`."""
        return self._client.get(TrialView, at("trials", trial))

    def score(self, trial: str) -> dict[str, object]:
        """See :class:`Reader`."""
        return self._client.get(dict[str, object], at("trials", trial, "score"))

    def fetch(self, trial: str, target: Path) -> None:
        """See :class:`Reader`."""
        self._client.download(at("trials", trial, "bundle"), target)


class AtHome:
    """The index and the bundles of a home that no server uses."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def trials(
        self, state: TrialState | None = None, subject: str | None = None, limit: int = 1, offset: int = 0
    ) -> TrialPage:
        """See :class:`Reader`."""
        if not self._indexed():
            return TrialPage(items=(), total=0, limit=limit, offset=offset)
        return self._archive().trials(state=state, subject=subject, limit=limit, offset=offset)

    def trial(self, trial: str) -> TrialView:
        """See :class:`Reader`."""
        return self._archive().trial(trial)

    def score(self, trial: str) -> dict[str, object]:
        """See :class:`Reader`."""
        return self._archive().score(trial)

    def fetch(self, trial: str, target: Path) -> None:
        """See :class:`Reader`."""
        from api import tarstream

        members = tarstream.plan(self._archive().bundle(trial), trial)
        with arriving(target) as f:
            f.writelines(tarstream.stream(members))

    def _indexed(self) -> bool:
        try:
            return self._paths.database.exists()
        except OSError as e:
            raise ConfigError(
                f"{self._paths.home} cannot be read: {e.strerror}",
                hint="run as the server's user, usually root",
            ) from e

    def _archive(self) -> Archive:
        from appliance.pipeline.archive import Archive
        from appliance.store.database import Store

        if not self._indexed():  # opening the index would make one, in whatever folder was named
            raise UserError(
                f"there are no trials in {self._paths.home}",
                hint="`hotcell run replicator` makes one; --home names another home; "
                "`hotcell reindex` makes a lost index anew",
            )
        return Archive(Store(self._paths.database), self._paths)


def reader(ctx: typer.Context) -> Reader:
    """The server if one answers, else the home. What was read without a server is said on stderr.

    Raises:
        PrerequisiteError: a server was named with ``--server`` and does not answer.
    """
    o = options(ctx)
    try:
        client = ctx.with_resource(connect(o.paths, o.server, o.token_file))
        client.get(HealthView, "health")
    except PrerequisiteError:
        if o.server is not None:
            raise
        note(f"no server runs; read from {o.paths.home}")
        return AtHome(o.paths)
    return Asked(client)


def trial_id(source: Reader, name: str) -> str:
    """``name``, or the newest trial's id for ``last``.

    Raises:
        UserError: there is none yet.
    """
    if name != "last":
        return name
    newest = source.trials().items
    if not newest:
        raise UserError("there are no trials yet", hint="run one: `hotcell run replicator`")
    return newest[0].id
