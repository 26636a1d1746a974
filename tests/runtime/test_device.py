"""Which GPU a rank gets, whatever a machine shows it of its GPUs."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from spmd.runtime import device
from spmd.runtime.device import check_own_gpus, choose_device
from spmd.topology import Topology


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("count", "ranks", "local", "chosen"), [(8, 8, 3, 3), (8, 2, 1, 1), (1, 1, 0, 0), (1, 8, 3, 0)]
)
def test_each_rank_gets_its_own(shown: pytest.MonkeyPatch, count: int, ranks: int, local: int, chosen: int) -> None:
    """The last one is a task of srun with --gpus-per-task=1, which sees its own GPU alone."""
    shown.setattr(torch.cuda, "device_count", lambda: count)
    shown.setenv("LOCAL_WORLD_SIZE", str(ranks))
    shown.setenv("LOCAL_RANK", str(local))
    assert choose_device("auto") == torch.device("cuda", chosen)


def test_more_ranks_than_gpus_that_all_of_them_see(shown: pytest.MonkeyPatch) -> None:
    shown.setattr(torch.cuda, "device_count", lambda: 2)
    shown.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="each of the 4 ranks on this machine needs a GPU of its own, it has 2"):
        choose_device("auto")


def told(monkeypatch: pytest.MonkeyPatch, uuids: list[str]) -> str:
    """What rank 0 hears where the ranks of one machine have these GPUs."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuids[0]))
    monkeypatch.setattr(device, "host", lambda: "node1")

    def gather(everyone: list[str], own: str) -> None:
        assert own == f"{uuids[0]} on node1"
        everyone[:] = [f"{uuid} on node1" for uuid in uuids]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    try:
        check_own_gpus(torch.device("cuda", 0), Topology(dp=len(uuids)))
    except ValueError as error:
        return str(error)
    return ""


def test_two_ranks_on_one_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, ["a", "b", "c", "d"]) == ""
    message = told(monkeypatch, ["a", "b", "c", "b"])
    assert message.startswith("ranks 1 and 3 have the same GPU, b on node1: each needs one of its own; start fewer")
    check_own_gpus(torch.device("cpu"), Topology(dp=2))
