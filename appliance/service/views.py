"""What the laboratory answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from appliance.errors import Blame
from appliance.model import (
    Accelerator,
    Firmware,
    Frozen,
    Name,
    PciAddress,
    Role,
    Sha256,
    Stopped,
    TrialId,
    TrialState,
)
from appliance.service.requests import Key
from appliance.trial.records import ResetProof

BaselineKind = Literal["ram", "disk"]


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
    firmware: Firmware = Field(description="What it boots with; `uefi` keeps variables in a file of its own.")
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
