"""Trials as the index and the folders hold them: what a server tells of them, and what can be told without one."""

from __future__ import annotations

from pathlib import Path

from appliance.errors import ConflictError
from appliance.host.paths import Paths
from appliance.model import TrialState
from appliance.pipeline import views
from appliance.service import TrialPage, TrialView
from appliance.store import queries
from appliance.store.database import Store
from appliance.trial import records


class Archive:
    """One home's trials. It knows nothing that only a running process knows: the queue.

    Raises of every method: NotFoundError: no such trial; LabError: the index is not usable.
    """

    def __init__(self, store: Store, paths: Paths) -> None:
        self._store = store
        self._paths = paths

    def trials(self, *, state: TrialState | None, subject: str | None, limit: int, offset: int) -> TrialPage:
        """Trials, newest first."""
        page = queries.trials(
            self._store, states=(state,) if state else (), subject=subject, limit=limit, offset=offset
        )
        items = tuple(views.trial_view(r, self._paths) for r in page.rows)
        return TrialPage(items=items, total=page.total, limit=limit, offset=offset)

    def trial(self, trial_id: str) -> TrialView:
        """One trial."""
        return views.trial_view(queries.get(self._store, trial_id), self._paths)

    def folder(self, trial_id: str) -> Path:
        """Where its files are now, open or sealed."""
        queries.get(self._store, trial_id)
        return self.place(trial_id)

    def place(self, trial_id: str) -> Path:
        """As :meth:`folder`, of a trial that is known to exist."""
        sealed = self._paths.bundles / trial_id
        return sealed if sealed.exists() else self._paths.open_trials / trial_id

    def score(self, trial_id: str) -> dict[str, object]:
        """The scorecard as JSON.

        Raises:
            ConflictError: it has none.
        """
        from appliance.score.card import Scorecard
        from appliance.score.load import load_record

        path = self.folder(trial_id) / records.SCORE
        if not path.exists():
            state = queries.get(self._store, trial_id).state
            raise ConflictError(
                f"trial {trial_id} has no score: it is {state}", hint="only a sealed trial is scored"
            )
        return load_record(path, Scorecard).model_dump(mode="json")

    def bundle(self, trial_id: str) -> Path:
        """Directory of the sealed evidence.

        Raises:
            ConflictError: it is not sealed.
        """
        queries.get(self._store, trial_id)
        path = self._paths.bundles / trial_id
        if not path.exists():
            raise ConflictError(
                f"trial {trial_id} is not sealed yet", hint=f"`hotcell follow {trial_id}` waits for it"
            )
        return path
