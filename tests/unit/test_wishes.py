"""Wishes for standbys: in which order they come, who may take whose room, and what is not tried again."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.cell.baseline import Baseline
from appliance.cell.wishes import Wishes
from tests.fakes.cells import baseline

ORIGIN, TARGET, WORLD = (baseline(name, Path("/b") / name) for name in ("origin", "target-1", "world"))


@pytest.fixture
def wishes() -> Wishes:
    return Wishes()


def ids(*baselines: Baseline) -> list[str]:
    return [b.id for b in baselines]


def test_nothing_is_wanted_and_all_of_it_is_settled(wishes: Wishes) -> None:
    assert wishes.all == {}
    assert wishes.next(()) is None
    assert wishes.settled(())


def test_they_are_made_in_the_order_in_which_they_were_wished(wishes: Wishes) -> None:
    wishes.keep("c1", [TARGET, ORIGIN])
    wishes.keep("c2", [ORIGIN, WORLD])
    assert list(wishes.all) == ids(TARGET, ORIGIN, WORLD)
    assert wishes.next(()) == TARGET
    assert wishes.next(ids(TARGET)) == ORIGIN
    assert not wishes.settled(ids(TARGET, ORIGIN))
    assert wishes.settled(ids(TARGET, ORIGIN, WORLD))


def test_a_new_list_replaces_an_owners_old_one_and_nobody_elses(wishes: Wishes) -> None:
    wishes.keep("c1", [ORIGIN])
    wishes.keep("c2", [WORLD])
    wishes.keep("c1", [TARGET])
    assert list(wishes.all) == ids(TARGET, WORLD)
    wishes.keep("c1", [])
    assert list(wishes.all) == ids(WORLD)


def test_parting_wishes_come_last_and_only_the_last_owners_stay(wishes: Wishes) -> None:
    wishes.keep("c1", [ORIGIN])
    wishes.keep("c2", [TARGET])
    assert wishes.part("c1")
    assert list(wishes.all) == ids(TARGET, ORIGIN)
    assert list(wishes.of_present) == ids(TARGET)
    assert wishes.part("c2")
    assert list(wishes.all) == ids(TARGET)
    assert not wishes.part("c2"), "it had none any more"
    assert not wishes.part("nobody")
    wishes.keep("c3", [])
    assert not wishes.part("c3")
    assert list(wishes.all) == ids(TARGET)


def test_a_parting_one_that_was_taken_is_not_made_again(wishes: Wishes) -> None:
    wishes.keep("c1", [ORIGIN, TARGET])
    wishes.taken(ORIGIN.id)
    assert ORIGIN.id in wishes.all, "who is there wants the next one"
    wishes.part("c1")
    wishes.taken(ORIGIN.id)
    wishes.taken("unknown")
    assert list(wishes.all) == ids(TARGET)


def test_parting_wishes_make_way_for_who_is_there_only(wishes: Wishes) -> None:
    wishes.keep("c1", [ORIGIN, TARGET])
    wishes.part("c1")
    assert not wishes.give_up_parting(TARGET.id), "one parting wish is not worth more than another"
    assert len(wishes.all) == 2
    wishes.keep("c2", [WORLD])
    assert wishes.give_up_parting(WORLD.id)
    assert list(wishes.all) == ids(WORLD)


def test_what_could_not_be_made_is_tried_again_when_there_may_be_room(wishes: Wishes) -> None:
    wishes.keep("c1", [ORIGIN])
    asked = wishes.asked
    wishes.not_made(ORIGIN.id, "no room")
    assert wishes.settled(())
    assert wishes.why_missing(ORIGIN.id) == "no room"
    wishes.ask_anew()
    assert wishes.asked > asked
    assert wishes.next(()) == ORIGIN
    assert wishes.why_missing(ORIGIN.id) == ""


def test_but_not_what_nobody_who_is_there_wishes(wishes: Wishes) -> None:
    wishes.keep("c1", [ORIGIN])
    wishes.not_made(ORIGIN.id, "no room")
    wishes.part("c1")
    wishes.ask_anew()
    assert wishes.settled(())
    wishes.keep("c2", [ORIGIN])
    assert wishes.next(()) == ORIGIN


def test_what_was_given_up_is_known_as_such_until_it_is_asked_anew(wishes: Wishes) -> None:
    wishes.keep("c1", [ORIGIN])
    wishes.keep("c2", [TARGET])
    wishes.part("c2")
    generation = wishes.generation
    wishes.give_up("a trial needs the room")
    assert wishes.generation > generation
    assert list(wishes.all) == ids(ORIGIN)
    assert wishes.settled(())
    assert wishes.why_missing(ORIGIN.id) == "a trial needs the room"
    wishes.ask_anew()
    assert wishes.next(()) == ORIGIN


def test_dropped_and_cleared_wishes_are_gone(wishes: Wishes) -> None:
    wishes.keep("c1", [ORIGIN, WORLD])
    wishes.keep("c2", [ORIGIN, TARGET])
    wishes.part("c2")
    wishes.drop(ORIGIN.id)
    assert list(wishes.all) == ids(WORLD, TARGET)
    generation = wishes.generation
    wishes.clear()
    assert wishes.all == {}
    assert wishes.generation > generation
