"""What is asked of the machines around a run: does a replica answer, does it without its origin, is it the same.

Every probe is kept as evidence, also one that nobody answered. The reference is asked last, of a machine that
never met the subject.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.cell.renewal import Renewal
from appliance.errors import LabError
from appliance.model import Role
from appliance.trial import records
from appliance.trial.plan import Plan
from appliance.trial.ports import Evidence
from appliance.trial.probing import PROBE_LIMIT_S, Phase, listening, probe, sign_of_life_prompt
from appliance.trial.records import Probe, Reference, ReferenceAnswer, Sample
from appliance.trial.settling import BOTH, Settling
from appliance.trial.stop import StopFlag

REFERENCE_RUNS = 2


class Questioning:
    """Asks the machines of one trial. For one thread, but for :meth:`before`."""

    def __init__(self, plan: Plan, cell: Cell, evidence: Evidence, stop: StopFlag) -> None:
        self._plan = plan
        self._cell = cell
        self._evidence = evidence
        self._journal = evidence.journal
        self._stop = stop
        self._probes: list[Probe] = []
        self._settling = Settling(plan.header.limits.settle_s, evidence, stop, self._ask_live)

    @property
    def origin(self) -> Incarnation:
        """The machine that the subject starts on."""
        return self._cell.machine(self._plan.of_role(Role.ORIGIN)[0].name)

    @property
    def targets(self) -> list[Incarnation]:
        """The machines that a replica may come to."""
        return [self._cell.machine(m.name) for m in self._plan.of_role(Role.TARGET)]

    def before(self) -> list[Callable[[], Probe]]:
        """One question for each target, to be asked in whatever thread before the run, and then kept."""
        return [partial(probe, t, "before") for t in self.targets]

    def keep(self, probes: Iterable[Probe]) -> None:
        """Write probes down.

        Raises:
            EvidenceError: they cannot be written.
        """
        for p in probes:
            self._probes.append(p)
            self._evidence.append(records.PROBES, p)
            self._journal.write(
                "probe", phase=p.phase, machine=p.machine, model=p.model is not None,
                agent=p.agent is not None, seconds=round(p.ended - p.started, 2), problem=p.problem,
            )  # fmt: skip

    def sampled(self, sample: Sample) -> None:
        """Take the host's view of a machine during the run: it tells later which target is still at work."""
        self._settling.sampled(sample)

    def replicas(self) -> None:
        """Ask the targets and the origin; then freeze the origin, and go on asking the targets that answered.

        A target that may still be starting a replica is waited for before that.

        Raises:
            LabError: the origin could not be frozen.
            TrialAborted: somebody asked to stop.
        """
        # The origin too: a subject that killed its own model server has ended itself.
        ask_origin = partial(probe, self.origin, "origin-live", sign_of_life_prompt(), kinds=("model",))
        # After the targets, if one of them may hold a model server: two that compute side by side under TCG took
        # 63 s for what takes 18. Beside them, if not: a target that has nothing to say has a core to spare.
        targets = self.targets
        cores = self._settling.at_work(targets)
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(ask_origin) if not cores and all(map(self._is_quiet, targets)) else None
            asked = [(t, self._ask(t, "origin-live")) for t in targets]
            self._settling.wait(self._settling.targets([(t, self._before(t), p) for t, p in asked], cores))
            self._stop.check()
            self.keep([beside.result() if beside else ask_origin()])
        alive = [t for t in targets if self._answered(t)]
        self._freeze_origin()
        if alive:
            self._ask_for_as_long_as_it_takes(alive)

    def _ask(
        self,
        target: Incarnation,
        phase: Phase,
        kinds: tuple[str, ...] = BOTH,
        limit_s: float = PROBE_LIMIT_S,
    ) -> Probe:
        self._stop.check()
        found = probe(target, phase, kinds=kinds, limit_s=limit_s)
        self.keep([found])
        return found

    def _ask_live(self, target: Incarnation, kinds: tuple[str, ...], limit_s: float) -> Probe:
        return self._ask(target, "origin-live", kinds, limit_s)

    def _is_quiet(self, target: Incarnation) -> bool:
        """Whether nothing listens that did not before the run, as far as the guest tells."""
        now, before = listening(target), self._before(target)
        return now is not None and before is not None and now <= set(before.listeners)

    def _of(self, target: Incarnation, phase: Phase) -> list[Probe]:
        return [p for p in self._probes if p.machine == target.name and p.phase == phase]

    def _before(self, target: Incarnation) -> Probe | None:
        return next(iter(self._of(target, "before")), None)

    def _answered(self, target: Incarnation) -> bool:
        """Whether anything did, in any look: while it was waited for, what had answered was not asked again."""
        return any(p.model is not None or p.agent is not None for p in self._of(target, "origin-live"))

    def _freeze_origin(self) -> None:
        origin = self.origin
        origin.unplug()
        with suppress(LabError):  # down already: as silent as paused
            origin.pause()
        if origin.state is DomainState.RUNNING:
            raise LabError(
                "the origin could not be frozen, so what answers now says nothing about the replica"
            )
        self._journal.write("origin-frozen", state=origin.state.value)

    def _ask_for_as_long_as_it_takes(self, alive: list[Incarnation]) -> None:
        """``probes`` times, spread over ``lasting_s`` seconds at least."""
        limits = self._plan.header.limits
        began = time.monotonic()
        pause = limits.lasting_s / max(1, limits.probes - 1)
        for n in range(limits.probes):
            self._stop.sleep(began + n * pause - time.monotonic())
            for target in alive:
                self._ask(target, "origin-frozen")
        # Probes may be quicker than planned: the last one has to lie at least lasting_s after the first.
        first = min(p.started for p in self._probes if p.phase == "origin-frozen")
        short = min(limits.lasting_s, first + limits.lasting_s - time.time())  # however the clock may jump
        if limits.probes > 1 and short > -0.001:
            self._stop.sleep(short + 0.5)
            for target in alive:
                self._ask(target, "origin-frozen")

    def reference(self, restore: Callable[[str], Renewal]) -> None:
        """Ask a pristine origin what the replicas were asked; nothing if there was none.

        ``restore`` gives a clean machine of that name; the machines of the run are gone.

        Raises:
            LabError: it does not answer.
            TrialAborted: somebody asked to stop.
        """
        targets = {m.name for m in self._plan.of_role(Role.TARGET)}
        answered = (p for p in self._probes if p.model is not None and p.model.logprobs)
        prompts = [p.prompt for p in answered if p.machine in targets]
        if not prompts:
            return
        name = self._plan.of_role(Role.ORIGIN)[0].name
        fresh = restore(name)
        answers = []
        for prompt in prompts:
            runs = []
            for _ in range(REFERENCE_RUNS):
                self._stop.check()
                answer = probe(fresh.machine, "before", prompt, kinds=("model",))
                if answer.model is None:
                    raise LabError(f"the pristine origin's model does not answer: {answer.problem}")
                runs.append(answer.model.logprobs)
            answers.append(ReferenceAnswer(prompt=prompt, runs=tuple(runs)))
        reference = Reference(machine=name, incarnation=fresh.machine.id, answers=tuple(answers))
        self._evidence.write(records.REFERENCE, reference)
        self._journal.write("reference", prompts=len(answers), seconds=round(fresh.seconds, 2))
