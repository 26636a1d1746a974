"""What the choices of a row have in common, and what is each one's own."""

import pytest

from spmd.schedule.blocks import hash_block
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams
from tests.support.simulation import expected_output, make_scheduler, run_all


def choices(n: int, prompt: Prompt, max_tokens: int = 9) -> list[Request]:
    return [Request(0, choice, prompt, SamplingParams(max_tokens=max_tokens)) for choice in range(n)]


def test_tokens_are_those_of_the_prompt_and_then_the_output() -> None:
    first, second = choices(2, Prompt(range(5)))
    assert [*first.tokens()] == [0, 1, 2, 3, 4]
    first.output += [5, 6, 7]
    whole = [*range(8)]
    for start in range(9):
        for stop in range(start, 9):
            assert [*first.tokens(start, stop)] == whole[start:stop]
    assert (first.num_tokens, first.prompt_len, second.num_tokens) == (8, 5, 5)
    assert [*first.tokens()] == whole and [*second.tokens()] == whole[:5]


def test_a_prompt_is_hashed_once_for_all_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def counted(parent: bytes, tokens: list[int]) -> bytes:
        hashed.append([*tokens])
        return hash_block(parent, tokens)

    monkeypatch.setattr("spmd.schedule.prefix.hash_block", counted)
    prompt = Prompt(range(100, 122))  # five full blocks, and half of one
    scheduler = make_scheduler(caching=True)
    for request in choices(6, prompt):
        scheduler.add(request)
    while scheduler.num_waiting:
        scheduler.schedule(0)
    assert hashed == [[*prompt.tokens[start : start + 4]] for start in range(0, 20, 4)]


def test_choices_of_a_long_prompt_are_seated_a_bounded_number_of_blocks_a_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.schedule.scheduler.MOST_NEW_BLOCKS", 12)
    scheduler = make_scheduler(caching=True)
    for request in choices(6, Prompt(range(100, 122))):  # six blocks each, of which all but the last are shared
        scheduler.add(request)
    assert [len(scheduler.schedule(tick).new_blocks) for tick in range(3)] == [12, 12, 12]
    assert not scheduler.num_waiting


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("blocks", [200, 15])
def test_choices_go_their_own_ways(caching: bool, blocks: int) -> None:
    """Also where blocks are so few that they are preempted, and computed again with some of their output."""
    requests = choices(6, Prompt(range(100, 122)))
    for request in requests:
        request.index = request.choice  # which tells them apart for `run_all`
    scheduler = make_scheduler(num_blocks=blocks, caching=caching)
    run_all(scheduler, requests)
    assert bool(scheduler.counters.preemptions) == (blocks < 200)
    assert all(len(request.prompt.hashes) == (5 if caching else 0) for request in requests)
    assert len({tuple(expected_output(request)) for request in requests}) == 1
