"""How launch/torchrun.py ends, for each way in which ranks end; and that it says no more than is needed."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.support import jobs

ROOT = Path(__file__).parents[2]
# Rank 0 leaves its exit status as a run does. A rank that is told to stop ends with 75.
RANK = """
import os, signal, sys, time

def end(status):
    if rank == 0:
        open(os.environ["SPMD_STATUS"], "w").write(f"{status}\\n")
    sys.exit(status)

rank, does = int(os.environ["RANK"]), sys.argv[1]
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: end(75))
if does == "finish":
    end(0)
if does == "mistake" and rank == 0:
    print("error: yours", file=sys.stderr, flush=True)
    end(2)
if does == "theirs" and rank == 1:
    print("error: theirs", file=sys.stderr, flush=True)
    sys.exit(2)
if does == "crash" and rank == 1:
    sys.exit("error: mine")
if does == "die" and rank == 1:
    os.kill(os.getpid(), signal.SIGSEGV)
os.write(1, b"ready\\n")
time.sleep(60)
"""

# One rank is killed in mid-run, but not when torchrun has started the ranks again.
KILLED_ONCE = """
import os, signal
from spmd.engine import Engine
from spmd.generate import cli

run = Engine.tick

def killed(self, tick):
    if tick == 40 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    run(self, tick)

Engine.tick = killed
cli()
"""


def start(folder: Path, does: str, *options: str, meeting: str = "--standalone") -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    torchrun = [sys.executable, str(ROOT / "launch" / "torchrun.py"), meeting, "--nproc-per-node", "2", *options]
    env = {key: value for key, value in os.environ.items() if key != "SPMD_STATUS"} | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    command = [*torchrun, str(folder / "rank.py"), does]
    return subprocess.Popen(command, env=env | {"TMPDIR": str(folder)}, stdout=pipe, stderr=pipe, text=True)


def test_the_exit_code_is_the_ranks_and_only_a_crash_is_explained(tmp_path: Path) -> None:
    runs = {does: start(tmp_path, does) for does in ("finish", "mistake", "die")}
    runs |= {does: start(tmp_path, does, "--redirects", "3", "--tee", "0:3") for does in ("crash", "theirs")}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        runs["meet"] = start(tmp_path, "finish", meeting=f"--master-port={taken.getsockname()[1]}")
        printed = {does: run.communicate(timeout=100)[1].splitlines() for does, run in runs.items()}
    assert {does: run.returncode for does, run in runs.items()} == {
        "finish": 0,
        "mistake": 2,
        "die": 1,
        "crash": 1,
        "theirs": 2,
        "meet": 1,
    }
    assert printed["finish"] == []
    assert printed["mistake"] == ["error: yours"]
    assert printed["theirs"] == ["error: theirs"]
    assert len(printed["die"]) == 1 and printed["die"][0].startswith(
        "error: rank 1 was killed by SIGSEGV (local rank 1 on "
    )
    assert len(printed["meet"]) == 1 and re.match(
        "error: .* can't meet the other nodes: .*address .* in use", printed["meet"][0]
    )
    crash, log, mine = printed["crash"]
    assert crash.startswith("error: rank 1 ended with exit code 1 (local rank 1 on ")
    assert log.startswith("the end of ") and log.endswith("/1/stderr.log:")
    assert mine == "error: mine"
    assert [path.name for path in tmp_path.iterdir()] == ["rank.py"], "left behind"


def test_a_signal_goes_to_the_ranks(tmp_path: Path) -> None:
    runs = {number: start(tmp_path, "wait") for number in (signal.SIGINT, signal.SIGUSR1)}
    for number, run in runs.items():
        assert run.stdout is not None
        assert [run.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        run.send_signal(number)
    for run in runs.values():
        assert run.communicate(timeout=100) == ("", "")
        assert run.returncode == 75


def test_the_ranks_that_torchrun_starts_again_meet_and_answer_the_rows_that_are_left(tmp_path: Path) -> None:
    """torchrun keeps its store, and in it the address of the rank that was killed."""
    (tmp_path / "killed.py").write_text(KILLED_ONCE)
    jobs.write_rows(tmp_path / "in.jsonl", [{"prompt": f"{number}+217=", "max_tokens": 8} for number in range(60)])
    torchrun = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone", "--max-restarts", "1"]
    overrides = ("topology=dp2", "model=demo", "input=in.jsonl", "output=out.jsonl", "run_dir=run")
    seats = "scheduler.max_num_seqs=4"
    done = jobs.run([*torchrun, "--nproc-per-node", "2", str(tmp_path / "killed.py"), *overrides, seats], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search("resumed: [1-9][0-9]* more rows were done by earlier runs", done.stdout)
    assert sorted(jobs.bodies(tmp_path / "out.jsonl")) == sorted(f"row-{number}" for number in range(60))
