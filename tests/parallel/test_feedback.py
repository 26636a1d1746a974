"""Tokens from the leader's device to the first stage's: in time, in the right seats, and no host waits for its GPU."""

import random
import time
from typing import Any

import pytest
import torch

from spmd.parallel.feedback import TokenFeedback
from spmd.parallel.groups import connect
from spmd.schedule.plan import Plan
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import NO_TOKEN, Request, SamplingParams
from spmd.topology import Topology
from tests.support.ranks import Ranks

SEATS = 6


def plans(number: int) -> list[tuple[Plan, list[int]]]:
    """Plans that sample none to all seats, and their tokens; equal on all ranks."""
    rng, made = random.Random(0), []
    for tick in range(number):
        plan = Plan(tick)
        for seat in rng.sample(range(SEATS), rng.choice([0, 1, 3, SEATS])):
            plan.sampled.append(Request(seat, 0, Prompt([1]), SamplingParams(), seat=seat))
        made.append((plan, [rng.randrange(2**40) for _ in plan.sampled]))
    return made


def expected(done: list[tuple[Plan, list[int]]]) -> list[int]:
    latest = [0] * (SEATS + 1)
    for plan, tokens in done:
        for request, token in zip(plan.sampled, tokens, strict=True):
            latest[request.seat] = token
    return latest


def feedback(topology: Topology, device: torch.device, slots: int) -> TokenFeedback:
    groups = connect(topology, device, lookahead=True)
    return TokenFeedback(topology, groups.tokens, SEATS, slots, device)


def passed_back(rank: int, shape: dict[str, int], slots: int, cuda: bool = False) -> bool:
    """Whether at every tick the first stage has the tokens of N ticks ago, every rank at a pace of its own."""
    topology, rng, intact = Topology(**shape, rank=rank), random.Random(rank), True
    if cuda:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    wire, script = feedback(topology, device, slots), plans(40)
    seen = []
    for tick, (plan, tokens) in enumerate(script):
        wire.receive(plan)
        if topology.is_first_stage and not topology.is_leader:
            seen.append((wire.latest.clone(), expected(script[: max(0, tick + 1 - slots)])))
        time.sleep(rng.random() / 200)
        if topology.is_leader and plan.sampled:
            sampled = torch.tensor(tokens, device=device)
            wire.send(plan, sampled)
            sampled.zero_()
            intact &= len(wire._sending) <= slots
        if topology.is_leader and topology.is_first_stage:
            seen.append((wire.latest.clone(), expected(script[: tick + 1])))
    for plan, _ in plans(slots):  # ticks of empty plans, for what is still on its way
        plan.sampled.clear()
        wire.receive(plan)
    wire.drain()
    return intact and all(latest.tolist() == right for latest, right in seen)


@pytest.mark.parametrize(
    ("shape", "slots"),
    [
        ({"pp": 2}, 2),
        ({"pp": 3}, 4),
        ({"tp": 2}, 1),
        ({"tp": 3}, 2),
        ({"pp": 2, "tp": 2}, 2),
        ({"dp": 2, "pp": 2}, 3),
    ],
)
def test_the_first_stage_has_the_tokens_when_the_slot_comes_round(
    ranks: Ranks, shape: dict[str, int], slots: int
) -> None:
    size = shape.get("dp", 1) * shape.get("pp", 1) * shape.get("tp", 1)
    assert all(ranks.run(size, passed_back, shape, slots))


def group_sizes(rank: int, shape: dict[str, int], lookahead: bool) -> int | None:
    group = connect(Topology(**shape, rank=rank), torch.device("cpu"), lookahead).tokens
    return group.size() if group else None


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({"pp": 3}, [2, None, 2]),
        ({"tp": 2}, [2, 2]),
        ({"pp": 2, "tp": 2}, [3, 3, 3, None]),
        ({"dp": 2}, [None, None]),
        ({"dp": 2, "pp": 2}, [2, 2, 2, 2]),
    ],
)
def test_its_group_is_the_first_stage_and_the_leader(ranks: Ranks, shape: dict[str, int], sizes: list[Any]) -> None:
    assert ranks.run(len(sizes), group_sizes, shape, True) == sizes
    assert ranks.run(len(sizes), group_sizes, shape, False) == [None] * len(sizes)


def test_a_leader_that_is_the_first_stage_needs_no_group() -> None:
    wire, script = TokenFeedback(Topology(), None, SEATS, 1, torch.device("cpu")), plans(20)
    for tick, (plan, tokens) in enumerate(script):
        wire.receive(plan)
        if plan.sampled:
            wire.send(plan, torch.tensor(tokens))
        assert wire.latest.tolist() == expected(script[: tick + 1])


def test_what_a_forward_embeds_is_in_the_vocabulary_where_a_row_got_no_token() -> None:
    wire = TokenFeedback(Topology(), None, SEATS, 1, torch.device("cpu"))
    plan = Plan(0, sampled=[Request(seat, 0, Prompt([1]), SamplingParams(), seat=seat) for seat in (2, 4)])
    wire.send(plan, torch.tensor([NO_TOKEN, 7]))
    assert wire.latest.tolist() == [0, 0, 0, 0, 7, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_waits_for_its_gpu() -> None:
    device = torch.device("cuda")
    wire, script = TokenFeedback(Topology(), None, SEATS, 1, device), plans(20)
    sampled = [torch.tensor(tokens, device=device) for _, tokens in script]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for (plan, _), tokens in zip(script, sampled, strict=True):
            wire.receive(plan)
            if plan.sampled:
                wire.send(plan, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert wire.latest.tolist() == expected(script)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("shape", "slots"), [({"pp": 2}, 2), ({"tp": 2}, 1)])
def test_it_works_through_nccl(ranks: Ranks, shape: dict[str, int], slots: int) -> None:
    assert all(ranks.run(2, passed_back, shape, slots, True))
