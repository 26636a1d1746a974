"""Ranks that start from different things end at once, all with the same line, which names who differs in what."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from spmd.config import Config, ModelConfig, SchedulerConfig
from spmd.parallel.groups import connect
from spmd.runtime.agreement import ERROR, agree, difference, facts
from spmd.topology import Topology
from tests.support.ranks import Ranks

CONFIG = Config(
    model=ModelConfig("a", overrides={"rope_scaling": {"factor": 2.0}}),
    scheduler=SchedulerConfig(max_num_seqs=16),
    device="cpu",
)


def compared(rank: int, size: int, everyone: list[dict[str, str]]) -> str:
    """What a rank is told, a host a pair of ranks; and that all are still together afterwards."""
    connect(Topology(dp=size, rank=rank), torch.device("cpu"))
    os.environ["SLURMD_NODENAME"] = f"node{rank // 2 + 1}"
    try:
        agree(everyone[rank])
        told = ""
    except ValueError as error:
        told = str(error)
    finally:
        del os.environ["SLURMD_NODENAME"]
    dist.barrier()
    return told


def changed(section: str, **values: object) -> dict[str, str]:
    return facts(replace(CONFIG, **{section: replace(getattr(CONFIG, section), **values)}))


def test_facts_hold_every_key_and_more() -> None:
    found = facts(CONFIG)
    assert found["scheduler.max_num_seqs"] == "16"
    assert found["model.overrides.rope_scaling.factor"] == "2.0"
    assert found["model.path"] == '"a"' and found["input"] == "null"
    assert found["torch"] == torch.__version__ and found["the kind of device"] == "cpu"
    assert "run_dir" not in found and "guard.timeout" in found
    assert len(found["the digest of spmd's source files"]) == 16
    assert all(isinstance(value, str) for value in found.values())
    assert facts(replace(CONFIG, run_dir="elsewhere")) == found


def test_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts(CONFIG)
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert dict(facts(CONFIG).items() - before.items()) == {"the environment's NCCL_ALGO": "Ring"}


def test_ranks_that_agree_and_ranks_that_differ(ranks: Ranks) -> None:
    same, other = facts(CONFIG), changed("scheduler", max_num_seqs=8)
    assert ranks.run(3, compared, 3, [same] * 3) == [""] * 3
    [told] = set(ranks.run(3, compared, 3, [same, other, same]))
    assert told == (
        "ranks disagree: scheduler.max_num_seqs is 8 on rank 1 (node1), 16 on the others; "
        "start all ranks with the same command and the same files"
    )
    [told] = set(ranks.run(2, compared, 2, [same, same | {"torch": "2.12.1"}]))
    assert f"torch is 2.12.1 on rank 1 (node1), {torch.__version__} on rank 0 (node1);" in told
    stops = [changed("sampling", stop=["a", "b"]), changed("sampling", stop=["a"])]
    [told] = set(ranks.run(4, compared, 4, [stops[0], *[stops[1]] * 3]))
    assert 'ranks disagree: sampling.stop is ["a", "b"] on rank 0 (node1), ["a"] on the others;' in told
    overrides = [changed("model", overrides={}), same]
    [told] = set(ranks.run(2, compared, 2, overrides))
    assert "model.overrides.rope_scaling.factor is 2.0 on rank 1 (node1), absent on rank 0 (node1);" in told


def test_a_rank_without_facts_tells_why(ranks: Ranks) -> None:
    failed = {ERROR: "Key 'pq' not in 'TopologyConfig'"}
    same = facts(CONFIG)
    told = ranks.run(3, compared, 3, [same, same, failed])
    assert told == ["rank 2 (node2): Key 'pq' not in 'TopologyConfig'"] * 3
    assert ranks.run(2, compared, 2, [failed] * 2) == [failed[ERROR]] * 2


def test_alone_there_is_nobody_to_agree_with() -> None:
    agree(facts(CONFIG))
    with pytest.raises(ValueError, match="broken"):
        agree({ERROR: "broken"})


def test_many_ranks_are_told_shortly() -> None:
    """A thousand ranks on 125 hosts: one that is old, eight of one host, and one that has a value of its own each."""
    everyone = [(f"node{rank // 8}", {"a": "1", "b": "1", "c": "1", "d": str(rank)}) for rank in range(1000)]
    for rank in (8, 9, 10, 11, 12, 13, 14, 15):
        everyone[rank][1]["a"] = "0"
    everyone[999][1]["b"] = "x" * 300
    told = difference(everyone)
    assert told.startswith("ranks disagree: a is 0 on ranks 8-15 (node1), 1 on the others; b is xxx")
    assert "xxx... on rank 999 (node124), 1 on the others; d is 999 on rank 999 (node124), " in told
    assert " and 995 more, 0 on rank 0 (node0); start all" in told
    assert len(told) < 800
    for rank in range(0, 1000, 2):
        everyone[rank][1]["c"] = "2"
    where = "ranks 1, 3, 5, 7 and 496 more (node0, node1, node2, node3 and 121 more)"
    assert f"c is 1 on {where}, 2 on ranks 0, 2," in difference(everyone)
    wide = [("here", {f"key{n:02}": str(rank) for n in range(9)}) for rank in range(2)]
    assert "; key04 is 1 on rank 1 (here), 0 on rank 0 (here); and 4 more; start" in difference(wide)
