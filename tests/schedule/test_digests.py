"""Digests: equal as long as two ranks do the same, different for ever from the first tick at which they don't."""

import pytest

from spmd.schedule.digests import FIELDS, DigestChain, first_difference
from spmd.schedule.plan import Plan
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams

SAMPLED = [([7, 8], [False, False]), ([], []), ([9, 4], [True, False])]


def plans(altered: str | None = None, tick: int = 1) -> list[Plan]:
    """Three plans of two requests; in that of `tick` one thing differs from the usual."""
    made = []
    for number in range(3):
        requests = [Request(index, 0, Prompt([1, 2, 3]), SamplingParams(max_tokens=9)) for index in range(2)]
        for seat, request in enumerate(requests):
            request.seat = seat
        plan = Plan(number, requests, [number, number], [1, 1], 2, 2, new_blocks=[(0, number, 5 + number)])
        if number == tick and altered == "requests":
            requests[1].seat = 2
        elif number == tick and altered == "positions":
            plan.counts = [1, 2]
        elif number == tick and altered == "blocks":
            plan.new_blocks = [(0, number, 9)]
        made.append(plan)
    return made


def digests(altered: str | None = None, tick: int = 1) -> list[tuple[int, ...]]:
    chain, kept = DigestChain(), []
    for plan, (tokens, finished) in zip(plans(altered, tick), SAMPLED, strict=True):
        kept.append(chain.plan(plan))
        if altered == "tokens" and plan.tick + 1 == tick:
            tokens = [*tokens[:-1], 5]
        chain.commit(tokens, finished)
    return kept


@pytest.mark.parametrize("altered", FIELDS)
def test_each_thing_that_differs_shows_from_its_tick_on(altered: str) -> None:
    usual, other = digests(), digests(altered)
    differences = [first_difference(a, b) for a, b in zip(usual, other, strict=True)]
    assert differences == [None, altered, altered]


def test_an_end_is_as_good_as_a_token() -> None:
    one, other = DigestChain(), DigestChain()
    one.commit([7], [True])
    other.commit([7], [False])
    assert first_difference(one.plan(Plan(0)), other.plan(Plan(0))) == "tokens"


def test_digests_are_kept_and_fit_into_a_packet() -> None:
    kept: list[tuple[int, tuple[int, ...]]] = []
    chain = DigestChain(lambda tick, digests: kept.append((tick, digests)))
    made = [chain.plan(plan) for plan in plans()]
    assert kept == [*enumerate(made)]
    assert all(0 <= digest < 2**32 for each in made for digest in each)
