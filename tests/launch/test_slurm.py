"""Jobs on a real SLURM of two nodes: whatever ends an attempt, they go on if that helps and answer each row once.

Skipped where SLURM can't be had.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spmd.demo import prompts
from tests.support.jobs import ROOT, read_rows
from tests.support.slurm_cluster import Cluster, cluster, missing, until

ROWS = 600
DEMO = "model=demo device=cpu sampling.max_tokens=8 sampling.temperature=0 progress=false scheduler.max_num_seqs=4"
# Stands for the ranks' Python: rank 1 ends as the job is to show, the others wait until they are ended.
STAND_IN = f"""#!/usr/bin/env bash
[ "$1" = -m ] || exec {sys.executable} "$@"
case $SLURM_PROCID-$RANK_1 in
  1-crashes) kill -KILL $$ ;;
  1-mistakes) exit 2 ;;
  *-stops) exit 75 ;;
esac
trap 'exit 75' TERM
sleep 600 & wait
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(f"no SLURM: {reason}")
    with cluster(tmp_path_factory.mktemp("slurm")) as daemons:
        yield daemons


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs run: an input, and a ready venv for make."""
    folder = tmp_path_factory.mktemp("jobs")
    prompts.write(folder / "in.jsonl", ROWS)
    (folder / "runs").mkdir()
    write_program(folder / "venv" / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "venv" / ".ready").touch()
    return folder


@pytest.fixture(scope="module")
def stand_ins(slurm: Cluster, folder: Path) -> dict[str, str]:
    """Jobs, by what their ranks do, that end while others work."""
    python = write_program(folder / "stand-in", STAND_IN)
    settings = f"--export=ALL,PYTHON={python},SPMD_HOME={ROOT},SPMD_MAX_REQUEUES=1,RANK_1="
    sbatch = ["sbatch", "--parsable", f"--chdir={folder}", "--output=runs/slurm-%j.out", "--cpus-per-task=1"]

    def submit(does: str, tasks: int = 2) -> str:
        size = [f"--ntasks-per-node={tasks}", "--gpus-per-node=0", settings + does]
        return slurm.run(*sbatch, *size, str(ROOT / "launch" / "slurm.sbatch"), "topology=pp2", "model=demo").strip()

    jobs = {does: submit(does) for does in ("waits", "crashes", "stops", "mistakes")}
    return jobs | {"too-large": submit("waits", tasks=3)}


@pytest.fixture(scope="module")
def array(slurm: Cluster, folder: Path) -> str:
    """An array of two jobs, on two nodes each, whose ranks srun starts itself; both are cut short."""
    options = {"NODES": 2, "GPUS": 1, "CPUS": 1, "NATIVE": 1, "ARRAY": 2}
    array = make_slurm(slurm, folder, "topology=pp2 output=whole.jsonl", **options)
    ends = {0: lambda job: slurm.run("scontrol", "requeue", job), 1: slurm.warn}

    def none_is_left() -> bool:
        """Ends each that answers, in whichever order they start: one takes no longer than the other may be late."""
        for part in [part for part in ends if answered(folder / f"whole-0000{part}-of-00002.jsonl") > 20]:
            ends.pop(part)(f"{array}_{part}")
        return not ends

    until(none_is_left, f"answers of jobs {array}_0 and {array}_1")
    until(lambda: all(slurm.job(f"{array}_{part}")["Restarts"] == "1" for part in range(2)), "the requeues")
    return array


def write_program(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def make_slurm(slurm: Cluster, folder: Path, args: str, **options: object) -> str:
    """`make slurm` with `folder` as the job's; the job's id."""
    words = [f"{name}={value}" for name, value in options.items()]
    make = ["make", "-C", str(ROOT), "--no-print-directory", "slurm", f"VENV={folder}/venv", *words]
    return slurm.run(*make, f"SBATCH=--chdir={folder}", f"ARGS={DEMO} input=in.jsonl {args}").split()[-1]


def texts(output: Path) -> dict[str, str]:
    """The answers' texts by custom_id; each stands there once."""
    rows = read_rows(output)
    answers = {row["custom_id"]: str(prompts.answer(row)) for row in rows}
    assert len(answers) == len(rows)
    return answers


def until_it_answers(slurm: Cluster, folder: Path, job: str, output: str) -> None:
    """Wait until a job that has been started, or requeued, answers rows."""
    state = slurm.job(job)
    attempt, run = int(state["Restarts"]), folder / "runs" / state["JobId"]
    until(lambda: attempt == 0 or (run / f"logs.{attempt}").exists(), f"attempt {attempt} of job {job}")
    until(lambda: "start-up: " in read(run / "logs" / "rank-0.log"), f"the ranks of job {job}")
    before = answered(folder / output)
    until(lambda: answered(folder / output) > before + 20, f"answers of job {job}")


def answered(output: Path) -> int:
    """Lines in the parts of an output."""
    return sum(read(file).count("\n") for file in Path(f"{output}.parts").glob("*.jsonl"))


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def pid_of_rank(job: str, rank: int) -> int:
    """The process of a rank that torchrun started."""
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            environ = (proc / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if f"SLURM_JOB_ID={job}".encode() in environ and f"RANK={rank}".encode() in environ:
            return int(proc.name)
    raise AssertionError(f"no rank {rank} of job {job}")


def test_a_cancelled_job_is_not_requeued(slurm: Cluster, folder: Path, stand_ins: dict[str, str]) -> None:
    job = stand_ins["waits"]
    until((folder / "runs" / job / "output" / "0" / "rank-1.log").exists, "the ranks")
    slurm.run("scancel", job)
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    assert slurm.job(job)["Restarts"] == "0"


def test_a_job_is_requeued_until_each_row_is_answered_once(slurm: Cluster, folder: Path, array: str) -> None:
    """Ended by the warning of its time limit and by the death of a rank."""
    job = make_slurm(slurm, folder, "topology=pp2 output=out.jsonl", NODES=2, PROCS=1)
    ends: list[Callable[[str], None]] = [slurm.warn, lambda job: os.kill(pid_of_rank(job, 1), signal.SIGKILL)]
    for attempt, end in enumerate(ends, 1):
        until_it_answers(slurm, folder, job, "out.jsonl")
        end(job)
        until(lambda: slurm.job(job)["Restarts"] == str(attempt), f"requeue {attempt}")  # noqa: B023
    ended = slurm.wait(job)
    printed = (folder / "runs" / f"slurm-{job}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), printed
    for line in (
        f"job {job} attempt 0: stopped in good order, requeued to go on",
        "error: rank 1 was killed by SIGKILL (local rank 0 on node2, pid ",
        f"job {job} attempt 1: crashed, requeued (failure 1 in a row; the job ends after 3)",
        "[rank 0] answers: out.jsonl",
    ):
        assert printed.count(line) == 1, printed
    assert "Traceback" not in printed
    assert list(texts(folder / "out.jsonl")) == [row["custom_id"] for row in read_rows(folder / "in.jsonl")]
    run = folder / "runs" / job
    assert all((run / logs / "rank-1.log").exists() for logs in ("logs.1", "logs.2", "logs"))
    assert sorted(path.name for path in (run / "output").iterdir()) == ["0", "1", "2"]


def test_an_array_of_native_jobs_answers_each_row_in_one_of_them(slurm: Cluster, folder: Path, array: str) -> None:
    """One was requeued by hand, the other warned that its time is nearly up."""
    answers: dict[str, str] = {}
    for part in range(2):
        job = slurm.wait(f"{array}_{part}")
        printed = Path(job["StdOut"]).read_text()
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), printed
        assert printed.count(f"job {array}_{part} attempt 0: stopped in good order, requeued to go on") == part
        answers |= texts(folder / f"whole-0000{part}-of-00002.jsonl")
        run = folder / "runs" / job["JobId"]
        assert (run / "logs" / "rank-1.log").exists() and (run / "output" / "0" / "rank-1.log").exists()
    assert answers == texts(folder / "out.jsonl")
    right = sum(text == prompts.right_answer(custom_id) for custom_id, text in answers.items())
    assert right >= prompts.PASS * ROWS


def test_a_crash_is_requeued_but_not_for_ever(slurm: Cluster, stand_ins: dict[str, str]) -> None:
    ended = slurm.wait(stand_ins["crashes"])
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1")
    printed = Path(ended["StdOut"]).read_text()
    assert printed.count("error: rank 1 on node") == 2
    assert printed.endswith("attempt 1: crashed, not requeued after 2 failures in a row\n")


def test_nor_is_a_job_whose_time_is_too_short_to_start_up(slurm: Cluster, stand_ins: dict[str, str]) -> None:
    ended = slurm.wait(stand_ins["stops"])
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1")
    printed = Path(ended["StdOut"]).read_text()
    assert printed.endswith("attempt 1: stopped during start-up, not requeued after 2 failures in a row\n")


def test_a_mistake_is_not_requeued(slurm: Cluster, stand_ins: dict[str, str]) -> None:
    ended = slurm.wait(stand_ins["mistakes"])
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "requeued" not in Path(ended["StdOut"]).read_text()


def test_a_job_of_another_size_than_the_topology_starts_no_ranks(slurm: Cluster, stand_ins: dict[str, str]) -> None:
    ended = slurm.wait(stand_ins["too-large"])
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert Path(ended["StdOut"]).read_text() == (
        "error: topology.dp=1 x topology.pp=2 x topology.tp=1 needs 2 processes, the job's 1 nodes x 3 processes gives "
        "3; change the topology or the job's size\n"
    )
