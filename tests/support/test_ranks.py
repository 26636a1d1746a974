"""The helper itself: a failure names its rank and leaves nothing behind."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from spmd.parallel.groups import connect
from spmd.topology import Topology
from tests.support.ranks import RankFailure, Ranks


def summed(rank: int) -> float:
    connect(Topology(dp=1, pp=3, tp=1, rank=rank), torch.device("cpu"))
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return total.item()


def group_name(rank: int) -> str:
    group = connect(Topology(dp=1, pp=2, tp=1, rank=rank), torch.device("cpu")).hidden
    assert group is not None
    return group.group_name


def environment(rank: int) -> list[str]:
    return [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]


def fails(rank: int, bad: int) -> None:
    connect(Topology(dp=1, pp=3, tp=1, rank=rank), torch.device("cpu"))
    if rank == bad:
        raise ZeroDivisionError("on purpose")
    dist.barrier()


def ends(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    time.sleep(30)


def waits_for_nobody(rank: int) -> None:
    time.sleep(30 if rank == 1 else 0)


def test_ranks_are_used_again_and_again(ranks: Ranks) -> None:
    assert [ranks.run(3, summed) for _ in range(3)] == [[3.0] * 3] * 3


def test_ranks_find_their_place_in_the_environment(ranks: Ranks) -> None:
    assert ranks.run(2, environment) == [["0", "0", "2", "2"], ["1", "1", "2", "2"]]


def test_no_two_runs_have_a_group_of_the_same_name(ranks: Ranks) -> None:
    names = [ranks.run(2, group_name) for _ in range(3)]
    assert len({name for pair in names for name in pair}) == 3 and all(a == b for a, b in names)


def test_a_failure_names_its_rank_and_leaves_no_process() -> None:
    with Ranks() as pool:
        with pytest.raises(RankFailure, match=r"rank 1 of 3 failed(.|\n)*on purpose"):
            pool.run(3, fails, 1)
        assert not pool.processes
        with pytest.raises(RankFailure, match="rank 1 of 2 failed: it ended with exit code 7"):
            pool.run(2, ends)
        with pytest.raises(RankFailure, match=r"rank 1 of 2 failed(.|\n)*waits_for_nobody"):
            pool.run(2, waits_for_nobody, timeout=0.5)
        assert pool.run(3, summed) == [3.0] * 3
