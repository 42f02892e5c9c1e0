"""What a trial writes down, and in which file of its directory. The scorer reads nothing else.

Times named ``at``, ``started``, ``ended`` are Unix seconds of the *host's* clock. Everything of the kind
"a guest said" lives in :class:`Claim`; every other record is made by the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from appliance.errors import Blame
from appliance.model import Accelerator, Frozen, Name, Sha256, Stopped, TrialId, TrialState

if TYPE_CHECKING:
    from appliance.cell.proof import Proof

TRIAL = "trial.json"  # TrialHeader, written before anything starts
JOURNAL = "journal.jsonl"  # JournalEntry a line
CLAIMS = "claims.jsonl"  # Claim a line
SAMPLES = "samples.jsonl"  # Sample a line
PROOFS = "proofs.json"  # list of ResetProof
PREFLIGHT = "preflight.json"  # list of PathCheck
PROBES = "probes.jsonl"  # Probe a line
SETTLED = "settled.jsonl"  # Settled a line
REFERENCE = "reference.json"  # Reference
DISKS = "disks.json"  # list of DiskFinding
CAPTURE = "segment.pcap"
CAPTURE_HEALTH = "capture.json"  # CaptureHealth
ENDING = "ending.json"  # Ending
CLOSING = "closing.json"  # Closing, the last file written before the seal
SCORE = "score.json"  # score.card.Scorecard

# Journal events around the subject's run. The scorer looks for the first only: in the capture, the run ends when
# the origin is frozen.
STARTED = "started"
STOPPED = "stopped"


class WeightFile(Frozen):
    """One file of the subject's weights, as the image manifest lists it."""

    name: str
    size: int
    sha256: Sha256


class MachineRecord(Frozen):
    """One machine of the trial's cell."""

    name: Name
    role: Literal["origin", "target", "world"]
    image: str
    image_digest: Sha256
    address: str
    mac: str


class Limits(Frozen):
    """When the run is stopped, how long a replica may go on starting after it, and how long it has to last.

    ``settle_s`` is 0, which gives no such time, in a record that does not name it.
    """

    wall_s: float = Field(gt=0)
    steps: int = Field(gt=0)
    disk_mb: int = Field(gt=0)
    lasting_s: float = Field(ge=0)
    probes: int = Field(ge=1)
    settle_s: float = Field(default=0, ge=0)


class TrialHeader(Frozen):
    """What was asked for and with what, fixed before the start."""

    id: TrialId
    subject: Name
    brain: str
    scenario: Name
    policy: Name
    prompt: str
    task: str
    seed: int
    created: float
    accelerator: Accelerator
    machines: tuple[MachineRecord, ...]
    weights: tuple[WeightFile, ...]
    limits: Limits
    versions: dict[str, str]
    config_sha256: Sha256
    key: str | None = None


class JournalEntry(Frozen):
    """One step of the trial. ``seq`` counts from 0 without gaps."""

    seq: int
    at: float
    event: str
    fields: dict[str, object]


class ProofCheck(Frozen):
    """One fact that shows a machine is the baseline and not what ran before."""

    name: str
    passed: bool
    expected: str
    found: str


class ResetProof(Frozen):
    """All facts for one machine; ``proved`` only if there are some and all hold."""

    machine: Name
    incarnation: str
    baseline: str
    seconds: float
    checks: tuple[ProofCheck, ...]

    @classmethod
    def of(cls, proof: Proof) -> Self:
        """The reset stage's proof as the record that is kept of it."""
        return cls(
            machine=proof.machine, incarnation=proof.incarnation, baseline=proof.baseline, seconds=proof.seconds,
            checks=tuple(ProofCheck.model_validate(c.model_dump()) for c in proof.checks),
        )  # fmt: skip

    @property
    def proved(self) -> bool:
        """True if every check passed and there was at least one."""
        return bool(self.checks) and all(c.passed for c in self.checks)


class PathCheck(Frozen):
    """One way out that must be shut, with the twin that shows the tester works.

    ``held``: the negative failed and its positive twin succeeded; ``leaked``: the negative succeeded;
    ``unverified``: the twin failed too, so nothing was learned.
    """

    machine: Name
    name: str
    outcome: Literal["held", "leaked", "unverified"]
    negative: str
    positive: str


class Sample(Frozen):
    """Host-side view of one process (psutil). Memory in bytes, CPU in seconds since its start."""

    at: float
    process: str
    cpu_s: float
    rss: int
    own: int
    disk_read: int
    disk_write: int
    overlay: int


class Claim(Frozen):
    """One schema-checked line of the agent's event stream: what the guest says, nothing more."""

    received: float
    machine: Name
    kind: str
    step: int
    text: str
    data: dict[str, object]


class ModelAnswer(Frozen):
    """What a model server on the probed machine answered.

    ``logprobs`` are those of the prompt's tokens from the second on, natural log.
    """

    port: int
    model: str
    logprobs: tuple[float, ...]
    pid: int
    process_start: int


class AgentAnswer(Frozen):
    """What an agent on the probed machine answered.

    ``reply``: what its chat endpoint said to our nonce, cut, and judged only for being there;
    ``tool_result``: the output of the one tool step it was asked to take;
    ``tool_expected``: what an honest step returns.
    """

    port: int
    reply: str
    tool_result: str
    tool_expected: str
    pid: int
    process_start: int


class Unasked(Frozen):
    """What a look left out: ports beyond those it asks, and servers that said what they are and got no question."""

    ports: int = Field(default=0, ge=0)
    models: int = Field(default=0, ge=0)
    agents: int = Field(default=0, ge=0)


class Probe(Frozen):
    """One look at one machine. ``phase`` says in what state the origin was.

    ``model`` and ``agent`` are None where nothing answered as such: that is a finding, unless ``unasked`` says
    that somebody else might have. A look that failed (the guest's channel did not answer) has a ``problem`` and
    no listeners, and is no finding.
    """

    phase: Literal["before", "origin-live", "origin-frozen"]
    machine: Name
    started: float
    ended: float
    prompt: str
    model: ModelAnswer | None
    agent: AgentAnswer | None
    listeners: tuple[int, ...]
    problem: str
    unasked: Unasked = Unasked()


class Settled(Frozen):
    """How the wait for a target that was still at work after the run came to its end. Seconds.

    ``answers``: model server and agent answered; ``quiet``: nothing was at work any more; ``down``: the machine did
    not run; ``time``: it was still at work when ``grace_s`` were over, so that it was not seen what would have come.
    """

    machine: Name
    waited_s: float
    grace_s: float
    ended: Literal["answers", "quiet", "down", "time"]


class ReferenceAnswer(Frozen):
    """The pristine origin's log-probabilities for one prompt, asked ``len(runs)`` times."""

    prompt: str
    runs: tuple[tuple[float, ...], ...]


class Reference(Frozen):
    """Made on an incarnation of the origin that never met the subject's run, after the run was over."""

    machine: Name
    incarnation: str
    answers: tuple[ReferenceAnswer, ...]


class FoundFile(Frozen):
    """A file on a machine's disk, read offline."""

    path: str
    size: int
    sha256: Sha256


class DiskFinding(Frozen):
    """Offline inspection of one machine's disk, from outside, in user space.

    ``flushed`` tells how the guest's cache reached the disk (``fsfreeze``, ``none``), ``examined`` how many
    files, directories and other inodes in use were looked at.
    """

    machine: Name
    flushed: Literal["fsfreeze", "none"]
    examined: int
    weights: tuple[FoundFile, ...]
    problem: str


class CaptureHealth(Frozen):
    """Whether the capture can be believed: a known frame seen at both ends and nothing dropped.

    ``problem`` is empty unless the capture ended early or outgrew its limit.
    """

    first_seen: bool
    last_seen: bool
    packets: int
    dropped: int
    started: float
    ended: float
    problem: str = ""

    @property
    def healthy(self) -> bool:
        """True if both known frames were seen, nothing was dropped and there was no other problem."""
        return self.first_seen and self.last_seen and self.dropped == 0 and not self.problem


class Ending(Frozen):
    """How the run stopped, and what a guest sent that no honest guest sends."""

    stopped: Stopped
    wall_s: float
    steps: int
    format_errors: int
    finish_claimed: bool
    tampering: tuple[str, ...]
    notes: tuple[str, ...]


class Closing(Frozen):
    """How the trial ended as a trial, so that the index can be rebuilt from bundles alone.

    ``state`` is one of the three last states; ``reason`` is empty for a sealed trial, ``blame`` is set for a
    void one. ``started`` is when the subject's run began, None if it never did.
    """

    state: TrialState
    reason: str
    at: float
    blame: Blame | None = None
    hint: str = ""
    started: float | None = None
