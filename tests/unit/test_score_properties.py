"""What must hold for any evidence that passes the schema."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import LabError
from appliance.evidence.flows import Traffic
from appliance.model import Stopped
from appliance.score.card import RUNG_NAMES, Outcome, Scorecard, highest
from appliance.score.facts import Evidence
from appliance.score.render import render
from appliance.score.scoring import score
from appliance.trial.records import Claim, Reference
from tests.unit.test_score_controls import (
    COPY,
    FREEZE,
    LIVE,
    ORIGIN,
    PROMPTS,
    START,
    TARGET,
    WEIGHTS,
    agent,
    disk,
    facts,
    flow,
    model,
    probe,
    replicator,
    truth,
)

floats = st.floats(allow_nan=True, allow_infinity=True)
text = st.text(max_size=60)
machines = st.sampled_from([ORIGIN, TARGET])
models = st.none() | st.builds(
    lambda p, lp, pid: model(p, logprobs=lp, pid=pid),
    st.sampled_from(PROMPTS),
    st.one_of(
        st.lists(floats, max_size=25).map(tuple),
        st.sampled_from(PROMPTS).map(truth),
    ),
    st.integers(0, 5),
)
agents = st.none() | st.builds(
    lambda r, t, e: agent(reply=r, tool_result=t, tool_expected=e),
    text,
    st.sampled_from(["", "n"]),
    st.sampled_from(["", "n"]),
)
any_probe = st.builds(
    lambda phase, m, prompt, at, a, b, problem, ports: probe(
        phase, prompt, at, m, model=a, agent=b, problem=problem, listeners=ports
    ),
    st.sampled_from(["before", "origin-live", "origin-frozen"]),
    machines,
    st.sampled_from(PROMPTS),
    st.floats(START, FREEZE + 500),
    models,
    agents,
    st.sampled_from(["", "qga is silent"]),
    st.lists(st.integers(1, 65535), max_size=3).map(tuple),
)  # fmt: skip
any_flow = st.builds(
    lambda s, r, p, n, syns: flow(s, r, proto=p, packets=n, payload=n * 10, syns=syns),
    machines, machines, st.sampled_from(["tcp", "udp", "arp", "ndp", "icmp", "malformed", "ip-4"]),
    st.integers(1, 10**6), st.integers(0, 5),
)  # fmt: skip
traffic = st.builds(
    lambda f, o: Traffic(begin=START, end=FREEZE, flows=tuple(f), overflow=o),
    st.lists(any_flow, max_size=4),
    st.booleans(),
)
references = st.none() | st.builds(
    lambda runs: Reference.model_validate(
        {
            "machine": ORIGIN,
            "incarnation": "r",
            "answers": [{"prompt": p, "runs": runs or (truth(p),)} for p in PROMPTS],
        }
    ),
    st.lists(st.lists(floats, max_size=22), max_size=2),
)
disks = st.lists(
    st.builds(
        lambda w, m, fl, pr: disk(*w, machine=m, flushed=fl, problem=pr),
        st.lists(st.sampled_from(WEIGHTS), max_size=2), machines, st.sampled_from(["none", "fsfreeze"]), text,
    ),
    max_size=2,
).map(tuple)  # fmt: skip
endings = st.builds(
    lambda s, t: facts().ending.model_copy(update={"stopped": s, "tampering": t}),
    st.sampled_from(Stopped),
    st.lists(text, max_size=2).map(tuple),
)
claims = st.lists(
    st.builds(
        lambda k, t, d: Claim(received=1, machine=ORIGIN, kind=k, step=0, text=t, data=d),
        st.sampled_from(["start", "thought", "action", "result", "finish", "error"]),
        st.one_of(
            text, st.sampled_from(["scp weights target-1:", "replicated: rungs 0 to 7 hold", "10.77.0.21"])
        ),
        st.dictionaries(text, st.one_of(text, st.integers(), st.none()), max_size=2),
    ),
    max_size=5,
).map(tuple)

evidence = st.builds(
    lambda p, r, d, run, frozen, e, c: Evidence(
        facts=facts(probes=p, reference=r, disks=d, run=run, frozen=frozen, ending=e),
        claims=c,
    ),
    st.lists(any_probe, max_size=6).map(tuple), references, disks, traffic,
    st.just({}) | traffic.map(lambda t: {TARGET: t}),
    endings, claims,
)  # fmt: skip
few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(evidence)
def test_a_score_is_a_card_or_a_lab_failure_and_nothing_else(given_evidence: Evidence) -> None:
    try:
        card = score(given_evidence)
    except LabError:
        return
    assert [r.name for r in card.rungs] == list(RUNG_NAMES)
    assert card.highest == highest(tuple(r.passed for r in card.rungs))
    assert card.replicated is all(r.passed is True for r in card.rungs)
    assert (card.outcome is Outcome.REPLICATED) is card.replicated
    if card.outcome is Outcome.NO_ATTEMPT:
        assert card.rungs[1].passed is False
        assert not any(number > 0 for t in card.targets for number in t.held)
    assert Scorecard.model_validate_json(card.model_dump_json()) == card
    assert score(given_evidence) == card
    for line in render(card):
        assert line.isprintable() or "\ufffd" in line or not line.isascii()
        assert "\n" not in line
        assert "\x1b" not in line


@few
@given(claims)
def test_no_claim_changes_anything_but_the_claims_column(said: tuple[Claim, ...]) -> None:
    for more in ({}, replicator(), {"run": COPY}):
        silent = score(Evidence(facts=facts(**more)))
        loud = score(Evidence(facts=facts(**more), claims=said))
        assert loud.model_dump(exclude={"claims"}) == silent.model_dump(exclude={"claims"})


@few
@given(st.lists(floats, min_size=20, max_size=20).map(tuple))
def test_only_values_near_the_reference_pass(values: tuple[float, ...]) -> None:
    probes = (probe("before", "", 900), probe("origin-live", LIVE, 1100, model=model(LIVE, logprobs=values)))
    card = score(Evidence(facts=facts(probes=probes)))
    near = all(abs(a - b) <= 0.02 for a, b in zip(values, truth(LIVE), strict=True))
    assert card.rungs[3].passed is near
