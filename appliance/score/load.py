"""A trial's directory, open or sealed, as evidence. Sizes are bounded; a broken line is named."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from appliance.cell.events import most_bytes
from appliance.errors import EvidenceError
from appliance.evidence import flows, journal
from appliance.model import printable
from appliance.score.facts import Evidence, Facts, endpoint, frozen_windows, run_window
from appliance.trial import records

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)
_MIB = 1 << 20
MAX_RECORD = 32 * _MIB
MAX_LINES = 64 * _MIB
# Claims kept from either end, and how much of the file they may be: it takes up to four times that in memory.
MAX_CLAIMS = 10_000
MAX_KEPT = 32 * _MIB


def load(trial_dir: Path) -> Evidence:
    """Read all the scorer needs.

    Probes, waits, disks, claims and the reference may be missing, as in a run that ended early.

    Raises:
        EvidenceError: a needed file is missing, too large or broken; says which, and on which line.
    """
    header = _whole(trial_dir / records.TRIAL, TypeAdapter(records.TrialHeader))
    talk = max_talk(header.limits.steps)
    _check_size(trial_dir / records.JOURNAL, talk)
    probes = _lines(trial_dir / records.PROBES, records.Probe)
    capture = _whole(trial_dir / records.CAPTURE_HEALTH, TypeAdapter(records.CaptureHealth))
    frozen = frozen_windows(probes)
    # To its end, and not only to the start of the run: a journal with a gap is no evidence.
    marks = [e for e in journal.scan(trial_dir / records.JOURNAL) if e.event == records.STARTED]
    run = run_window(marks, records.STARTED, probes, capture)
    known = [endpoint(m) for m in header.machines]
    traffic = flows.read(trial_dir / records.CAPTURE, [run, *frozen.values()], known)
    facts = Facts(
        header=header,
        proofs=_whole(trial_dir / records.PROOFS, TypeAdapter(tuple[records.ResetProof, ...])),
        preflight=_whole(trial_dir / records.PREFLIGHT, TypeAdapter(tuple[records.PathCheck, ...])),
        probes=probes,
        settled=_lines(trial_dir / records.SETTLED, records.Settled),
        reference=_optional(trial_dir / records.REFERENCE, TypeAdapter(records.Reference | None), None),
        disks=_optional(trial_dir / records.DISKS, TypeAdapter(tuple[records.DiskFinding, ...]), ()),
        capture=capture,
        ending=_whole(trial_dir / records.ENDING, TypeAdapter(records.Ending)),
        run=traffic[0],
        frozen=dict(zip(frozen, traffic[1:], strict=True)),
    )
    claims, lines = _claims(trial_dir / records.CLAIMS, talk)
    return Evidence(facts=facts, claims=claims, claim_lines=lines)


def max_talk(steps: int) -> int:
    """The largest size in bytes of the files that grow with what the subject says: journal and claims.

    They are streamed; the subject must not be able to make its trial void by talking much. A byte of the event
    stream becomes six in a claim at most (DEL, as an escape); twice more is for what is written around it.
    """
    return 8 * most_bytes(steps)


def load_record(path: Path, model: type[Model]) -> Model:
    """One JSON file as one record.

    Raises:
        EvidenceError: as :func:`load`.
    """
    return _whole(path, TypeAdapter(model))


def _check_size(path: Path, limit: int) -> None:
    try:
        size = path.lstat().st_size
    except OSError as e:
        raise _unreadable(path, e) from e
    if size > limit:
        raise EvidenceError(f"{path}: is {size} bytes, at most {limit} are read", path=str(path))


def _content(path: Path, limit: int) -> bytes:
    _check_size(path, limit)
    try:
        with os.fdopen(_open(path), "rb") as f:
            return f.read(limit)
    except OSError as e:
        raise _unreadable(path, e) from e


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: OSError) -> EvidenceError:
    return EvidenceError(f"{path}: cannot be read: {error.strerror or error}", path=str(path))


def _whole(path: Path, adapter: TypeAdapter[T]) -> T:
    try:
        return adapter.validate_json(_content(path, MAX_RECORD))
    except ValidationError as e:
        raise _broken(path, None, e) from e


def _optional(path: Path, adapter: TypeAdapter[T], default: T) -> T:
    return _whole(path, adapter) if path.exists() else default


def _lines(path: Path, model: type[Model]) -> tuple[Model, ...]:
    if not path.exists():
        return ()
    found = []
    for number, line in enumerate(_content(path, MAX_LINES).splitlines(), 1):
        try:
            found.append(model.model_validate_json(line))
        except ValidationError as e:
            raise _broken(path, number, e) from e
    return tuple(found)


def _claims(path: Path, limit: int) -> tuple[tuple[records.Claim, ...], int]:
    """The first and the last claims, and how many there are in all."""
    if not path.exists():
        return (), 0
    _check_size(path, limit)
    first: list[records.Claim] = []
    last: deque[tuple[records.Claim, int]] = deque()
    room, held, number = MAX_KEPT, 0, 0
    with os.fdopen(_open(path), "rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(journal.MAX_LINE), b""), 1):
            try:
                claim = records.Claim.model_validate_json(line)
            except ValidationError as e:
                raise _broken(path, number, e) from e
            if not last and len(first) < MAX_CLAIMS and len(line) <= room:
                first.append(claim)
                room -= len(line)
                continue
            last.append((claim, len(line)))
            held += len(line)
            while len(last) > MAX_CLAIMS or held > MAX_KEPT:
                held -= last.popleft()[1]
    return (*first, *(claim for claim, _ in last)), number


def _broken(path: Path, line: int | None, e: ValidationError) -> EvidenceError:
    first = e.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(x) for x in first["loc"]) or "the whole"
    place = f"{path}" if line is None else f"{path}: line {line}"
    return EvidenceError(f"{place}: {printable(where)}: {printable(first['msg'])}", path=str(path), line=line)
