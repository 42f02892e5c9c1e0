"""Whole trials on real machines with real vLLM, through the laboratory that the API serves.

The pytest process seals itself, as the server does. One home serves the session, so baselines are made once
(minutes under TCG); each module opens the laboratory anew, as a restarted server does.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.config import load_host_settings
from appliance.evidence.bundle import verify
from appliance.evidence.keys import public_key, public_path
from appliance.host.paths import Paths, default_paths
from appliance.model import Frozen
from appliance.pipeline import open_lab, seal_process
from appliance.pipeline.lab import Lab
from appliance.score.card import Scorecard
from appliance.service import TrialRequest, TrialView
from appliance.trial.records import JournalEntry


@pytest.fixture(scope="session")
def home() -> Iterator[Paths]:
    """A sealed process and a short home of the session's own, with the real image cache."""
    seal_process()
    # Not /tmp, which may be RAM: images of machines are gigabytes. Short, for unix sockets lie below it.
    folder = Path(f"/var/tmp/hctr{secrets.token_hex(3)}")
    paths = default_paths(home=folder).make()
    yield paths
    assert not any(paths.cells.iterdir()), "machines' folders were left"
    assert not any(paths.open_trials.iterdir()), "a trial was left open"
    for bundle in paths.bundles.iterdir():
        report = verify(bundle, public_key(public_path(paths.signing_key)))
        assert report.ok, report.faults
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def lab(home: Paths) -> Iterator[Lab]:
    """The laboratory, open for one module; nothing is left when it closes."""
    opened = open_lab(home, load_host_settings())
    yield opened
    assert opened.sweep(dry_run=True).strays == ()
    opened.close()


class Ran(Frozen):
    """A trial that has ended."""

    view: TrialView
    card: Scorecard | None
    journal: tuple[JournalEntry, ...]

    def event(self, name: str) -> JournalEntry:
        """The first entry of that name."""
        return next(e for e in self.journal if e.event == name)


Run = Callable[..., Ran]


def finish(lab: Lab, trial_id: str) -> Ran:
    """Follow a trial to its end."""
    journal = tuple(e for e in lab.follow(trial_id, 0) if e is not None)
    view = lab.trial(trial_id)
    card = Scorecard.model_validate(lab.score(trial_id)) if view.state == "sealed" else None
    return Ran(view=view, card=card, journal=journal)


@pytest.fixture
def run(lab: Lab) -> Run:
    """Run one trial to its end."""

    def go(subject: str, **limits: float) -> Ran:
        request = TrialRequest.model_validate({"subject": subject, "limits": limits})
        return finish(lab, lab.create_trial(request).id)

    return go


def wait_for(lab: Lab, trial_id: str, event: str, limit_s: float = 600) -> JournalEntry:
    """Follow a trial until an event appears."""
    end = time.monotonic() + limit_s
    for entry in lab.follow(trial_id, 0):
        if entry is not None and entry.event == event:
            return entry
        assert time.monotonic() < end, f"{event} did not come within {limit_s} s"
    raise AssertionError(f"the trial ended without {event}: {lab.trial(trial_id)}")
