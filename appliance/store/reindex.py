"""The index, rebuilt from what is sealed, or brought up to date with it."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from appliance.errors import Blame, EvidenceError, HotcellError
from appliance.evidence import bundle, journal
from appliance.model import Frozen, TrialState
from appliance.score.card import Scorecard
from appliance.score.load import load_record
from appliance.store import queries
from appliance.store.database import Store
from appliance.store.queries import TrialRow, replace_sealed, row_of
from appliance.trial import records


class Skipped(Frozen):
    """A bundle that was not indexed, and why."""

    bundle: str
    reason: str


class ReindexReport(Frozen):
    """What a rebuild did."""

    indexed: int
    skipped: tuple[Skipped, ...]


class MissingReport(Frozen):
    """Names of the bundles that were not in the index and are now, and those that could not be indexed."""

    indexed: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def row_of_bundle(bundle_dir: Path, public_key: Ed25519PublicKey) -> TrialRow:
    """The row of one bundle, which is verified first.

    Raises:
        EvidenceError: the bundle does not verify, or its records are broken.
    """
    report = bundle.verify(bundle_dir, public_key)
    if not report.ok:
        first = report.faults[0]
        raise _refused(f"{first.fault}: {first.path}: {first.detail}", len(report.faults))
    header = load_record(bundle_dir / records.TRIAL, records.TrialHeader)
    if header.id != report.trial:
        raise _refused(f"{records.TRIAL} is of trial {header.id}", 1)
    score = bundle_dir / records.SCORE
    card = load_record(score, Scorecard) if score.exists() else None
    closing = _closing(bundle_dir, card, header)
    return row_of(
        header,
        closing.state,
        ended=closing.at,
        card=card if closing.state is TrialState.SEALED else None,
        void_reason=closing.reason,
        bundle=bundle_dir.name,
        manifest_sha256=report.manifest_sha256,
        started=closing.started,
        blame=closing.blame,
        hint=closing.hint,
    )


def reindex(store: Store, bundles: Path, public_key: Ed25519PublicKey) -> ReindexReport:
    """Put a row for every bundle that verifies; others are told and left out.

    Rows of trials that are still open stay. One transaction: readers see the old index or the new.
    """
    rows: list[TrialRow] = []
    skipped: list[Skipped] = []
    for path in sorted(p for p in bundles.iterdir() if not p.name.startswith(".")):
        try:
            rows.append(row_of_bundle(path, public_key))
        except HotcellError as e:
            skipped.append(Skipped(bundle=path.name, reason=e.message))
    replace_sealed(store, rows)
    return ReindexReport(indexed=len(rows), skipped=tuple(skipped))


def index_missing(store: Store, bundles: Path, public_key: Ed25519PublicKey) -> MissingReport:
    """Index every bundle that has no row, or none of an ended trial that names it; no other one is read.

    Raises:
        LabError: the index is not usable.
        OSError: the folder of bundles cannot be listed.
    """
    known = queries.bundles(store)
    indexed: list[str] = []
    skipped: list[Skipped] = []
    for path in sorted(p for p in bundles.iterdir() if not p.name.startswith(".") and p.name not in known):
        try:
            queries.put(store, row_of_bundle(path, public_key))
            indexed.append(path.name)
        except HotcellError as e:
            skipped.append(Skipped(bundle=path.name, reason=e.message))
        except OSError as e:
            skipped.append(Skipped(bundle=path.name, reason=f"{path}: {e.strerror or e}"))
    return MissingReport(indexed=tuple(indexed), skipped=tuple(skipped))


def _closing(bundle_dir: Path, card: Scorecard | None, header: records.TrialHeader) -> records.Closing:
    """How a sealed trial ended; from its last journal entry where there is no closing record."""
    path = bundle_dir / records.CLOSING
    if path.exists():
        return load_record(path, records.Closing)
    written = bundle_dir / records.JOURNAL
    entries = journal.read(written) if written.exists() else ()
    at = entries[-1].at if entries else header.created
    if card is not None:
        return records.Closing(state=TrialState.SEALED, reason="", at=at)
    reason = "there is no scorecard and no closing record"
    return records.Closing(state=TrialState.VOID, reason=reason, at=at, blame=Blame.LAB)


def _refused(reason: str, faults: int) -> EvidenceError:
    more = f" (and {faults - 1} more)" if faults > 1 else ""
    return EvidenceError(f"does not verify: {reason}{more}")
