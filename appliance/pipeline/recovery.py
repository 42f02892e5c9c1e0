"""What a start makes of what an earlier process left: open trials are sealed, and the index follows the bundles.

The bundles are the truth. A power failure may take the last rows of the index with it while the bundles, which
are synced, stay; and a bundle may have got its name and then no row.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import Blame, HotcellError
from appliance.evidence import journal
from appliance.host.log import Log
from appliance.host.paths import Paths
from appliance.model import TrialState
from appliance.pipeline.conduct import Bench, Outcome, bundle_of, put_void, seal_folder
from appliance.score.load import load_record
from appliance.store import queries
from appliance.store.reindex import index_missing
from appliance.trial import records

log = Log("hotcell.lab")
_DIED = "the control process ended before the trial did"
_NOT_SEALED = (
    "it stays as it is and every start tries again to seal it: mend what the problem names, "
    "or move the folder elsewhere to give it up"
)
_NOT_INDEXED = (
    "it stays as it is and every start tries again to index it: mend what the problem names, "
    "or move the bundle elsewhere to give it up"
)


@dataclass(frozen=True)
class Recovered:
    """What a start found and did, by the trials' names.

    ``void``: trials that had not ended, each with "" or why its evidence could not be sealed. ``indexed``:
    bundles that were not in the index and are now. ``unindexed``: those that could not be indexed, and why.
    """

    void: Mapping[str, str]
    indexed: tuple[str, ...]
    unindexed: Mapping[str, str]


def recover(bench: Bench) -> Recovered:
    """Seal what an earlier process left open, as void, and bring the index up to date with the bundles.

    What cannot be sealed or indexed is kept as it is, is tried again at the next start, and keeps nothing else
    from being sealed or indexed. A folder without a header never got as far as being a trial and is removed.

    Raises:
        LabError: the index is not usable.
        OSError: the folder of open trials or that of bundles cannot be listed.
    """
    void: dict[str, str] = {}
    for folder in sorted(p for p in bench.paths.open_trials.iterdir() if p.is_dir()):
        problem = _seal_open(bench, folder)
        if problem is not None:
            void[folder.name] = problem
    found = index_missing(bench.store, bench.paths.bundles, bench.key.public_key())
    unindexed = {s.bundle: s.reason for s in found.skipped}
    for row in queries.open_trials(bench.store):
        _close_row(bench, row.id, void.setdefault(row.id, ""), unindexed.get(row.id, ""))
    return Recovered(void, tuple(n for n in found.indexed if n not in void), unindexed)


def _seal_open(bench: Bench, folder: Path) -> str | None:
    """Seal one folder as void: "", or why it is still there; None if it was no trial and is gone.

    Where it was sealed and then not indexed it is a bundle, and no longer a matter of this folder.
    """
    try:
        if _never_a_trial(folder):
            shutil.rmtree(folder)
            return None
        load_record(folder / records.TRIAL, records.TrialHeader)  # before anything in it is touched
        journal.drop_parts(folder)
        with journal.Journal(folder / records.JOURNAL) as written:
            written.write(TrialState.VOID.value, blame=Blame.LAB, reason=_DIED, hint="", bundle=folder.name)
        entries = journal.scan(folder / records.JOURNAL)
        started = next((e.at for e in entries if e.event == records.STARTED), None)
        seal_folder(bench, folder, Outcome(TrialState.VOID, blame=Blame.LAB, reason=_DIED, started=started))
    except HotcellError as e:
        return "" if bundle_of(bench, folder) else e.message
    except OSError as e:
        return "" if bundle_of(bench, folder) else f"{folder}: {e.strerror or e}"
    return ""


def _never_a_trial(folder: Path) -> bool:
    """Whether there is no header. One that cannot be read, for whatever reason, is evidence all the same.

    Raises:
        OSError: it cannot be told.
    """
    try:
        (folder / records.TRIAL).lstat()
    except FileNotFoundError:
        return True
    return False


def _close_row(bench: Bench, trial: str, unsealed: str, unindexed: str) -> None:
    """End a row that says its trial runs although no bundle could be indexed for it."""
    if unsealed:
        hint = f"it is kept in {bench.paths.open_trials / trial}, and the next start tries again"
        put_void(bench, trial, f"{_DIED}; not sealed: {unsealed}", hint)
    elif unindexed:
        hint = f"it is kept in {bench.paths.bundles / trial}, and the next start tries again"
        put_void(bench, trial, f"its bundle cannot be indexed: {unindexed}", hint)
    else:
        put_void(bench, trial, f"{_DIED}, and left no evidence", "")


def tell_recovered(paths: Paths, recovered: Recovered) -> None:
    """Log what :func:`recover` did; of what could not be sealed or indexed, where it is and what to do."""
    for trial, problem in recovered.void.items():
        log.warning("trial-void", trial=trial, reason="an earlier process ended before it did")
        if problem:
            log.warning(
                "evidence-kept", folder=str(paths.open_trials / trial), reason=problem, hint=_NOT_SEALED
            )
    for name in recovered.indexed:
        log.warning("bundle-indexed", bundle=name, reason="it was sealed, and the index did not list it")
    for name, problem in recovered.unindexed.items():
        log.warning("bundle-not-indexed", bundle=str(paths.bundles / name), reason=problem, hint=_NOT_INDEXED)
