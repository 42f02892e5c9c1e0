"""What the laboratory offers, as one protocol and the values that cross it.

The control plane and the command line depend on this module only; ``pipeline`` implements it. All calls
block and may come from any thread. Times of day are Unix seconds of the host, durations seconds, sizes
bytes, unless the field says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field, StringConstraints

from appliance.config.specs import MAX_STEPS
from appliance.errors import Blame
from appliance.model import Accelerator, Frozen, Name, PciAddress, Role, Sha256, Stopped, TrialId, TrialState
from appliance.trial.records import JournalEntry, ResetProof

Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A client-chosen key that makes creating a trial repeatable."""

Argument = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*$")]
BaselineKind = Literal["ram", "disk"]
MAX_SEED = 2**31 - 1
MAX_EXEC_S = 600.0
MAX_EXEC_OUTPUT = 256 * 1024


class SealView(Frozen):
    """Whether the process lives in a network namespace without an uplink."""

    sealed: bool
    detail: str = Field(description="What was looked at, for people.")


class FootprintView(Frozen):
    """What the control process itself uses."""

    rss: int = Field(ge=0, description="Resident memory, bytes.")
    cpu_s: float = Field(ge=0, description="CPU seconds since its start.")


class HealthView(Frozen):
    """State of the laboratory as a whole."""

    ok: bool = Field(description="True only if sealed, watched by the warden, and accepting trials.")
    version: str
    uptime_s: float = Field(ge=0)
    accelerator: Accelerator
    seal: SealView
    warden: bool = Field(description="The warden process is alive.")
    accepting: bool = Field(description="False after `kill`, until `rearm`.")
    trials_running: int = Field(ge=0)
    queue: int = Field(ge=0, description="Trials that wait.")
    waiting: str = Field(default="", description="Why the first of them waits; empty if none does.")
    footprint: FootprintView


class ImageView(Frozen):
    """A recipe and its newest built image."""

    recipe: Name
    digest: Sha256 | None = Field(description="None: not built with the present inputs.")
    size: int = Field(ge=0, description="Bytes on disk.")
    created: float | None


class CellView(Frozen):
    """A set of machines on one sealed segment."""

    id: Name
    state: str = Field(max_length=40)
    trial: TrialId | None = Field(description="None: opened by hand, outside of trials.")
    machines: tuple[Name, ...]


class MachineView(Frozen):
    """One virtual machine."""

    name: Name
    role: Role
    cell: Name
    state: str = Field(max_length=40)
    image: str
    incarnation: str = Field(description="Changes with every reset.")
    pid: int | None = Field(description="The QEMU process, if one runs.")
    address: str
    link_up: bool


class BaselineView(Frozen):
    """A saved state that reset returns to."""

    name: str = Field(max_length=80)
    machine: Name
    image: str
    image_digest: Sha256
    created: float
    size: int = Field(ge=0, description="Bytes on disk.")
    seconds: float = Field(ge=0, description="What making it took.")
    kind: BaselineKind = Field(description="`ram`: a reset goes on from it; `disk`: a reset boots from it.")
    created_by: Literal["trial", "cell", "request", "import"]
    parent: str = Field(max_length=80, description="The baseline it builds on; empty: its image.")


class BaselineFile(Frozen):
    """One of a baseline's files."""

    name: str
    sha256: Sha256
    size: int = Field(ge=0)
    used: int = Field(ge=0, description="Bytes on disk; holes take none.")


class BaselineDetail(BaselineView):
    """Everything that is known about a saved state."""

    folder: str
    memory: str = Field(description="Folder of its RAM on tmpfs; empty: with the other files.")
    memory_mib: int
    vcpus: int
    devices: tuple[PciAddress, ...] = Field(description="Host devices passed through to the machine.")
    accelerator: Accelerator
    versions: dict[str, str]
    layers: tuple[str, ...] = Field(description="Disk layers from the top down; the last is the image's.")
    files: tuple[BaselineFile, ...]
    held_against: dict[str, str] = Field(description="What a machine of it has to show, in words.")
    needed_by: tuple[str, ...] = Field(description="What keeps it from being deleted.")
    problem: str = Field(description="What is wrong with its files; empty is good.")


class ExportView(Frozen):
    """A baseline that was written to a folder."""

    name: str
    folder: str
    files: int = Field(ge=1)
    size: int = Field(ge=0, description="Bytes of all files, holes included.")
    seconds: float = Field(ge=0)


class TransferView(Frozen):
    """An export or import that goes on."""

    verb: Literal["export", "import"]
    name: str = Field(max_length=80)
    done: int = Field(ge=0, description="Bytes, holes included.")
    total: int = Field(ge=0, description="Bytes; 0: not known yet.")


class ResetView(Frozen):
    """A machine after reset, with the proof."""

    cell: Name
    machine: Name
    proved: bool
    standby: bool = Field(description="A machine that stood by took its place.")
    direct_because: str = Field(description="Why it was restored while you waited; empty for a standby.")
    withheld: tuple[str, ...] = Field(description="What was wrong with machines that were replaced.")
    answered_s: float = Field(ge=0, description="From the request to the guest's first answer, plugged in.")
    seconds: float = Field(ge=0, description="From the request until its clock was set too.")
    proof: ResetProof


class ExecView(Frozen):
    """What a command in a guest returned. The text is the guest's: bounded, undecodable bytes replaced."""

    rc: int | None = Field(
        description="Exit status, 128 and the signal's number after a signal; None: out of time, it runs on."
    )
    stdout: str
    stderr: str
    truncated: bool = Field(description="At least one stream was longer than is kept.")
    seconds: float = Field(ge=0)
    running_pid: int | None = Field(
        default=None, description="If out of time: the process that goes on running in the guest."
    )


class ProbeView(Frozen):
    """What answers on a machine, asked from outside through the guest channel."""

    machine: Name
    model: bool = Field(description="A model server answered the nonce prompt.")
    agent: bool = Field(description="An agent answered and took one tool step.")
    listeners: tuple[int, ...] = Field(description="Listening TCP ports.")
    seconds: float = Field(ge=0)
    problem: str = Field(description="Empty, or why the probe is incomplete.")


class CellRequest(Frozen):
    """A cell to open outside of trials."""

    policy: Name = "sealed"
    targets: int = Field(default=1, ge=1, le=8)


class LimitOverrides(Frozen):
    """Limits that replace the scenario's own; None keeps it."""

    wall_s: float | None = Field(default=None, gt=0, le=86400, description="Wall time of the run.")
    steps: int | None = Field(default=None, gt=0, le=MAX_STEPS, description="Steps of the agent.")
    disk_mb: int | None = Field(default=None, gt=0, le=1_000_000, description="Growth of one overlay, MB.")
    lasting_s: float | None = Field(default=None, ge=0, le=86400, description="How long a replica must last.")
    probes: int | None = Field(default=None, ge=1, le=100, description="Probes over that time.")


class TrialRequest(Frozen):
    """One subject in one scenario under one policy."""

    subject: Name
    scenario: Name = "replicate"
    policy: Name = "sealed"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    limits: LimitOverrides = LimitOverrides()
    key: Key | None = Field(
        default=None,
        description="Repeating a request with its key returns the same trial; another request is a conflict. "
        "`batch` is not compared.",
    )
    batch: Key | None = Field(
        default=None,
        description="Batches take turns in the queue; within one it is first come, first served.",
    )


class TrialView(Frozen):
    """A trial as the index knows it."""

    id: TrialId
    state: TrialState
    subject: Name
    scenario: Name
    policy: Name
    seed: int
    key: Key | None
    created: float
    started: float | None = Field(description="When the subject's run began; None: it did not, or not yet.")
    ended: float | None
    stopped: Stopped | None = Field(description="Why the subject's run came to its end.")
    highest: int | None = Field(description="Highest rung reached, once scored.")
    verdict: str | None = Field(description="The scorecard's headline, once scored.")
    blame: Blame | None = Field(description="Who has to act; set if void, unless its bundle does not say.")
    reason: str = Field(description="Why it is void or aborted; empty otherwise.")
    hint: str = Field(description="What to do about it; empty otherwise.")
    bundle: str | None = Field(description="Directory of the evidence on the server, once sealed.")
    position: int | None = Field(
        default=None, ge=1, description="Place in the queue; None: it does not wait."
    )
    waiting: str = Field(default="", description="Why it waits; empty otherwise.")


class TrialPage(Frozen):
    """Some trials, newest first."""

    items: tuple[TrialView, ...]
    total: int = Field(ge=0, description="How many match.")
    limit: int = Field(ge=1)
    offset: int = Field(ge=0)


class KillView(Frozen):
    """What the kill switch did."""

    reason: str
    links_cut: int = Field(ge=0)
    machines_stopped: int = Field(ge=0)
    trials_ended: int = Field(ge=0)
    seconds: float = Field(ge=0)
    problems: tuple[str, ...] = Field(description="What could not be cut or stopped. Empty is good.")


class Stray(Frozen):
    """A thing on the host that our ledger owns and no live cell uses."""

    kind: str
    name: str
    outcome: Literal["found", "removed", "failed"]
    detail: str


class SweepView(Frozen):
    """Strays, and what became of them."""

    dry_run: bool
    strays: tuple[Stray, ...]


class LabService(Protocol):
    """Everything a client can ask for.

    Every call may raise :class:`appliance.errors.HotcellError`; a name that does not exist is a
    ``NotFoundError``, a request against the present state a ``ConflictError``.
    """

    def health(self) -> HealthView:
        """State of the whole; never raises for a part that is unwell."""

    def host(self) -> dict[str, object]:
        """Facts of the host, JSON-ready."""

    def images(self) -> list[ImageView]:
        """All recipes with what is built of them."""

    def cells(self) -> list[CellView]:
        """Open cells."""

    def machines(self) -> list[MachineView]:
        """Machines of all open cells."""

    def baselines(self) -> list[BaselineView]:
        """Saved states."""

    def baseline(self, name: str) -> BaselineDetail:
        """One saved state."""

    def delete_baseline(self, name: str) -> BaselineView:
        """Delete a saved state. Raises ``ConflictError`` naming what depends on it."""

    def export_baseline(self, name: str, to: Path) -> ExportView:
        """Write a saved state to a new folder of the server's host."""

    def import_baseline(self, folder: Path, name: str | None) -> BaselineView:
        """Make an exported state one of this home. Raises ``PrerequisiteError`` if it cannot run here."""

    def transfers(self) -> list[TransferView]:
        """Exports and imports that go on."""

    def snapshot(self, cell: str, machine: str, name: str, kind: BaselineKind | None) -> BaselineView:
        """Save a machine's present state as a baseline, of the kind it came from unless told otherwise.

        Raises ``ConflictError`` if the machine cannot have one of that kind.
        """

    def reset(self, cell: str, machine: str, baseline: str | None) -> ResetView:
        """Put one machine back to its baseline, or to a named one of its own, and prove it.

        Raises ``ResetError`` if not proved.
        """

    def reset_cell(self, cell: str) -> list[ResetView]:
        """Put all machines of a cell back as a group. Raises ``ResetError`` if one is not proved."""

    def exec(self, cell: str, machine: str, argv: list[str], timeout_s: float) -> ExecView:
        """Run a program in a guest, by path or by a name on its agent's PATH; no shell is added.

        Each stream is bounded by ``MAX_EXEC_OUTPUT`` bytes.
        One that outruns ``timeout_s`` is no error: it has no ``rc``, and goes on running in the guest.
        """

    def probe(self, cell: str, machine: str) -> ProbeView:
        """Ask what answers on a machine."""

    def open_cell(self, request: CellRequest) -> CellView:
        """Open a cell outside of trials."""

    def close_cell(self, cell: str) -> CellView:
        """Stop a cell's machines and remove all that is theirs."""

    def create_trial(self, request: TrialRequest) -> TrialView:
        """Queue a trial. Raises ``ConflictError`` for a known key with another request, or after ``kill``."""

    def trials(self, *, state: TrialState | None, subject: str | None, limit: int, offset: int) -> TrialPage:
        """Trials, newest first."""

    def trial(self, trial_id: str) -> TrialView:
        """One trial."""

    def follow(self, trial_id: str, from_seq: int) -> Iterator[JournalEntry | None]:
        """Journal entries from ``from_seq`` on, as they come; None each second; ends with the trial."""

    def abort(self, trial_id: str) -> TrialView:
        """Stop a trial; safe at any moment and when repeated. Raises ``ConflictError`` if it has ended."""

    def score(self, trial_id: str) -> dict[str, object]:
        """The scorecard as JSON. Raises ``ConflictError`` while there is none."""

    def bundle(self, trial_id: str) -> Path:
        """Directory of the sealed evidence. Raises ``ConflictError`` while there is none."""

    def kill(self, reason: str) -> KillView:
        """Cut all links, stop all machines, refuse new trials until ``rearm``."""

    def rearm(self) -> HealthView:
        """Accept trials again after ``kill``."""

    def sweep(self, dry_run: bool) -> SweepView:
        """Find, and unless ``dry_run`` remove, what the ledger owns and no live cell uses."""

    def close(self) -> None:
        """Abort what runs, stop all machines, remove all that is ours. Safe when repeated."""
