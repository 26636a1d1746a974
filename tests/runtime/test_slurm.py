"""Environments as SLURM sets them, and what is made of them."""

import subprocess
import sys

import pytest

from spmd.config import TopologyConfig
from spmd.runtime.slurm import PORTS, Allocation, adopt_slurm, allocation, check_processes, first_host, port, shard

# The fourth of five tasks that srun started on three nodes.
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
ARRAY = {
    f"SLURM_ARRAY_TASK_{name}": value for name, value in {"MIN": "2", "MAX": "8", "STEP": "3", "COUNT": "3"}.items()
}


def test_a_task_takes_its_place_from_slurm() -> None:
    environ = dict(TASK)
    adopt_slurm(environ)
    added = {name: value for name, value in environ.items() if name not in TASK}
    place = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"}
    assert added == place | {"MASTER_PORT": str(port(TASK))}


def test_the_last_node_may_have_fewer_tasks_and_the_address_may_be_given() -> None:
    environ = TASK | {"SLURM_PROCID": "4", "SLURM_NODEID": "2", "SLURM_LOCALID": "0", "MASTER_ADDR": "10.0.0.1"}
    adopt_slurm(environ)
    assert (environ["LOCAL_WORLD_SIZE"], environ["MASTER_ADDR"]) == ("1", "10.0.0.1")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        TASK | {"RANK": "0"},  # torchrun's
    ],
)
def test_elsewhere_nothing_changes(environ: dict[str, str]) -> None:
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_a_variable_that_is_missing_is_named() -> None:
    environ = {name: value for name, value in TASK.items() if name != "SLURM_NODEID"}
    with pytest.raises(ValueError, match="SLURM_NODEID is not set: SLURM sets it"):
        adopt_slurm(environ)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-2]", "node1"),
        ("node[03,05-09]", "node03"),
        ("rack[2-3]-gpu[08-15],login", "rack2-gpu08"),
        ("a-b.example.org,c[1-2]", "a-b.example.org"),
        ("n[1-2]-ib0,n7", "n1-ib0"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_ports_differ_between_jobs_attempts_and_steps() -> None:
    jobs = [{"SLURM_JOB_ID": str(job)} for job in range(200)]
    assert len({port(job) for job in jobs}) == 200
    assert all(port(job) in PORTS for job in [*jobs, {"SLURM_JOB_ID": "4294967295"}])
    assert len({port(TASK), port(TASK | {"SLURM_RESTART_COUNT": "1"}), port(TASK | {"SLURM_STEP_ID": "1"})}) == 3


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "8"}, Allocation(2, 8, native=False)),
        ({"SLURM_GPUS_ON_NODE": "8"}, Allocation(2, 8, native=False)),
        ({"SLURM_NTASKS": "2", "SPMD_PROCS": "4"}, Allocation(2, 4, native=False)),
        ({"SLURM_NTASKS": "16", "SLURM_GPUS_ON_NODE": "8"}, Allocation(2, 8, native=True)),
        ({"SLURM_NTASKS": "2", "SPMD_NATIVE": "1"}, Allocation(2, 1, native=True)),
    ],
)
def test_allocation(environ: dict[str, str], expected: Allocation) -> None:
    assert allocation({"SLURM_JOB_NUM_NODES": "2"} | environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "SLURM_JOB_NUM_NODES is not set"),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "5"}, "5 tasks don't spread evenly over 2 nodes"),
        ({"SLURM_JOB_NUM_NODES": "2"}, "the job has neither GPUs"),
    ],
)
def test_a_job_whose_processes_are_unclear(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocation(environ)


def test_a_topology_of_another_size_is_told_with_the_sum() -> None:
    check_processes(TopologyConfig(dp=2, pp=2, tp=4), 16, "NODES=2 x GPUS=8")
    with pytest.raises(
        ValueError, match=r"dp=2 x topology.pp=2 x topology.tp=1 needs 4 processes, NODES=2 .* gives 16"
    ):
        check_processes(TopologyConfig(dp=2, pp=2), 16, "NODES=2 x GPUS=8")


def test_parts_of_an_array() -> None:
    assert shard({}) is None
    assert [shard(ARRAY | {"SLURM_ARRAY_TASK_ID": str(index)}) for index in (2, 5, 8)] == [(0, 3), (1, 3), (2, 3)]
    assert shard(ARRAY | {"SLURM_ARRAY_TASK_ID": "5", "SPMD_SHARDS": "16"}) == (5, 16)


@pytest.mark.parametrize("gap", [{"SLURM_ARRAY_TASK_COUNT": "2"}, {"SLURM_ARRAY_TASK_MAX": "9"}])
def test_an_array_with_gaps_would_leave_out_rows(gap: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="leave gaps: use --array=0-"):
        shard(ARRAY | {"SLURM_ARRAY_TASK_ID": "5"} | gap)


def test_no_torch_is_imported() -> None:
    code = "import sys, spmd.runtime.slurm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
