"""What launchers, shells and environments do to a start: it goes on, or one line says why not, before it waits."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch.distributed as dist

from spmd.messages import Mistake
from spmd.parallel.groups import join
from spmd.runtime.environment import (
    LEFT_OVER,
    check_environment,
    check_interfaces,
    environment_warnings,
    place,
    resolve_host,
    waiting,
)
from spmd.runtime.slurm import adopt_slurm
from tests.support.jobs import ONE_THREAD, launcher, run, run_here, start, write_rows

DEMO = ("model=demo", "input=in.jsonl", "output=out.jsonl", "run_dir=run", "progress=false")
MEETING = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
Error = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", [{"prompt": "1+217=", "max_tokens": 8, "temperature": 0}])
    return tmp_path


def test_variables_left_over_in_a_shell_are_told_before_anybody_is_waited_for(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Error
) -> None:
    for name, value in MEETING.items():
        monkeypatch.setenv(name, value)
    assert run_here(*DEMO) == 2
    [told] = capfd.readouterr().err.splitlines()
    assert told.startswith("error: ") and "needs 1 processes" in told and told.endswith(LEFT_OVER)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "abc"}, "RANK='abc' in the environment is not a number"),
        ({"RANK": "1"}, "RANK=1 with WORLD_SIZE=unset"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
        (MEETING | {"MASTER_PORT": ""}, "MASTER_PORT=unset is not a port"),
        (MEETING | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a port"),
    ],
)
def test_a_place_that_cannot_be(environ: Mapping[str, str], message: str) -> None:
    with pytest.raises(Mistake, match=message):
        place(environ)


def test_a_rank_of_torchrun_or_of_srun_is_launched() -> None:
    assert not place(MEETING).launched
    assert place(MEETING | {"TORCHELASTIC_RUN_ID": "x"}).launched
    assert place(MEETING | {"SLURM_PROCID": "0"}).launched


def test_a_rank_left_over_is_not_that_of_a_native_task() -> None:
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}
    task |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "node1", "SLURM_JOB_ID": "7"}
    environ = task | {"RANK": "0", "WORLD_SIZE": "1", "SPMD_NATIVE": "1"}
    adopt_slurm(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"]) == ("1", "2")


def test_who_waits_says_for_whom(capfd: Error, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.runtime.environment.ALONE", 0.01)
    said = ""
    with waiting(place(MEETING)):
        while not said.endswith("\n"):
            said += capfd.readouterr().err
            time.sleep(0.01)
    assert "rank 0 has waited 0 s to meet the other 1 of 2 ranks at localhost:29511; WORLD_SIZE" in said


def test_a_host_that_has_no_address(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Error) -> None:
    """As any other failure to meet it counts as the machine's, and SLURM queues the job again."""
    monkeypatch.setattr("spmd.runtime.environment.LOOKS", 1)
    for name, value in (MEETING | {"MASTER_ADDR": "no.such.host.invalid"}).items():
        monkeypatch.setenv(name, value)
    assert run_here("topology=pp2", *DEMO) == 1
    [told] = capfd.readouterr().err.splitlines()
    assert told.startswith("error: rank 0 can't meet the others at no.such.host.invalid:29511: ")


def test_a_rank_that_cannot_reach_another_says_so(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Error) -> None:
    def refused(timeout: float) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with Connection refused\nException raised from there")

    monkeypatch.setattr("spmd.runtime.main.join", refused)
    for name, value in MEETING.items():
        monkeypatch.setenv(name, value)
    assert run_here("topology=pp2", *DEMO) == 1
    [told] = capfd.readouterr().err.splitlines()
    assert told == (
        "error: rank 0 can't meet the others at localhost:29511: Gloo connectFullMesh failed with Connection refused"
    )


def test_a_name_server_that_is_slow_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolve(host: str, port: int) -> None:
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("spmd.runtime.environment.time.sleep", lambda seconds: None)
    resolve_host(place(MEETING))
    assert asked == ["localhost"] * 3


def test_a_network_interface_that_is_not_there(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Error) -> None:
    check_interfaces({})
    check_interfaces({"GLOO_SOCKET_IFNAME": "lo"})
    with pytest.raises(Mistake, match=r"GLOO_SOCKET_IFNAME=lo,ib7: this machine has no network interface 'ib7', it ha"):
        check_interfaces({"GLOO_SOCKET_IFNAME": "lo,ib7"})
    for name, value in (MEETING | {"GLOO_SOCKET_IFNAME": "ib7"}).items():
        monkeypatch.setenv(name, value)
    assert run_here("topology=pp2", *DEMO) == 2
    [told] = capfd.readouterr().err.splitlines()
    assert told.startswith("error: GLOO_SOCKET_IFNAME=ib7: this machine has no network interface 'ib7', it has ")


def test_a_debug_level_that_torch_refuses(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for level in ("", "off", "INFO", "detail"):
        check_environment({"TORCH_DISTRIBUTED_DEBUG": level})
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "ALL")
    done = run(launcher(*DEMO), here)
    assert done.returncode == 2
    assert done.stderr == "error: TORCH_DISTRIBUTED_DEBUG=ALL is not one of OFF, INFO, DETAIL, and torch refuses it\n"


def test_two_stages_pass_their_ticks_with_debug_level_detail(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    done = run(launcher("topology=pp2", *DEMO), here)
    assert done.returncode == 0, done.stderr
    assert "warning: TORCH_DISTRIBUTED_DEBUG=DETAIL is taken as INFO" in done.stderr
    assert environment_warnings({"TORCH_DISTRIBUTED_DEBUG": "INFO"}) == []


def test_joining_lowers_the_debug_level_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[dist.DebugLevel] = []
    before = dist.get_debug_level()
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: levels.append(dist.get_debug_level()))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    try:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
        join()
    finally:
        dist.set_debug_level(before)
    assert levels == [dist.DebugLevel.INFO]


def test_a_working_directory_that_was_deleted(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {launcher()[0]} model=demo"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told == ["error: the working directory is gone (No such file or directory): go to one that is there"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["random", "queue", "inspect", "tokenize"])
def test_files_of_ones_own_that_are_called_as_pythons(here: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an empty part of PYTHONPATH stands for the folder that one is in."""
    (here / f"{name}.py").write_text("raise SystemExit('mine')\n")
    if name == "queue":
        monkeypatch.setitem(ONE_THREAD, "PYTHONPATH", f":{here / 'none'}::")
    done = run(launcher(*DEMO), here)
    assert done.returncode == 0, done.stderr
    assert (here / "out.jsonl").exists()


def test_a_pipe_whose_reader_has_ended_costs_no_run(here: Path) -> None:
    job = start([*launcher(*DEMO), "progress=true"], here)
    assert job.stdout and job.stderr
    job.stdout.close()
    job.stderr.close()
    assert job.wait(timeout=120) == 0
    assert (here / "out.summary.json").exists()


def test_output_that_fails_ends_nothing() -> None:
    """/dev/full refuses every write, as a full disk does."""
    code = "from spmd.runtime.terminal import lasting_output\nwith lasting_output(): print('x' * 100000, flush=True)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, env=os.environ | ONE_THREAD, timeout=60)
    assert done.returncode == 0
