"""A campaign of faults: runs that are killed, terminated and resumed, on one topology or another, until they are done.

python tests/campaign.py [runs] [seed]

Each run answers the same rows, every other one from a compressed file and into a table. At a random moment a random
rank gets SIGKILL, SIGTERM or SIGUSR1; then the job is started again, a third of the times with another topology and
now and then to be disturbed again, until it is done. Every row must then be answered once, with the text of a run that
nobody disturbed, and no process may be left.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pyarrow import parquet

ROOT = Path(__file__).parents[1]
ROWS = 400
OTHERS = ("pp2", "dp2", "single", "tp2", "pp2tp2")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
MARK = "SPMD_CAMPAIGN"  # in the environment of all processes of an attempt
AGAIN = 0.25  # share of later attempts that are disturbed too
EARLY = 0.2  # share of disturbances while the ranks start up
PATIENCE = 300.0  # seconds for an attempt
LEFT = 5.0  # seconds in which all processes must be gone


@dataclass
class Tally:
    """What happened in all runs."""

    runs: int = 0
    attempts: int = 0
    hits: Counter[str] = field(default_factory=Counter)  # signals that reached a rank at work, or as it started
    codes: Counter[int] = field(default_factory=Counter)  # how attempts ended
    moved: int = 0  # attempts with another topology than the first
    left: int = 0  # processes that outlived their attempt

    def __str__(self) -> str:
        hits = ", ".join(f"{count} {name}" for name, count in sorted(self.hits.items()))
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(self.codes.items()))
        return (
            f"{self.runs} runs in {self.attempts} attempts, {self.moved} on another topology; disturbed by {hits}; "
            f"exit codes {codes}; {self.left} processes left over"
        )


class Job:
    """One job in a folder of its own, attempt after attempt."""

    def __init__(self, folder: Path, rows: Path) -> None:
        """Rows that are compressed are answered into a table, which is made of `output` at the end."""
        self.folder = folder
        self.rows = rows
        self.table = folder / "out.parquet" if rows.suffix == ".gz" else None
        self.output = Path(f"{self.table}.jsonl") if self.table else folder / "out.jsonl"

    def start(self, topology: str) -> subprocess.Popen[str]:
        overrides = [f"topology={topology}", "model=demo", "device=cpu", "model.dtype=float32", f"input={self.rows}"]
        overrides += [f"output={self.table or self.output}", f"run_dir={self.folder / 'run'}", "progress=false"]
        overrides += ["sampling.temperature=0", "sampling.max_tokens=8", "scheduler.max_num_seqs=4", "guard.timeout=10"]
        env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", MARK: str(self.folder)}
        return subprocess.Popen(
            [str(ROOT / "launch" / "local.sh"), *overrides],
            cwd=self.folder,
            env=env,
            stdout=open(self.folder / "stdout", "a"),
            stderr=open(self.folder / "stderr", "a"),
            text=True,
        )

    def processes(self) -> dict[int, bytes]:
        """Environments of the attempt's processes that are alive, by pid."""
        found, mark = {}, f"{MARK}={self.folder}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if mark in environment.split(b"\0"):
                    found[int(entry.name)] = environment
        return found

    def ranks(self) -> list[int]:
        """Those that have a rank's environment, but not their children, which read and build rows."""
        having = {pid for pid, environment in self.processes().items() if b"\0RANK=" in environment}
        return [pid for pid in having if _parent(pid) not in having]

    def answered(self) -> int:
        """Lines of the parts, roughly."""
        parts = Path(f"{self.output}.parts").glob("*.jsonl")
        return sum(part.read_bytes().count(b"\n") for part in parts if part.exists())


def _parent(pid: int) -> int:
    """0 if there is no such process any more."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def attempt(job: Job, topology: str, rng: random.Random | None, tally: Tally) -> int:
    """Start the job and, given `rng`, disturb it; its exit code."""
    process = job.start(topology)
    try:
        if rng:
            early = rng.random() < EARLY
            disturb(job, process, rng, rng.random() * 6 if early else None, tally)
        code = process.wait(PATIENCE)
    finally:
        deadline = time.monotonic() + LEFT
        while (left := job.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    tally.left += len(left)
    tally.attempts += 1
    tally.codes[code] += 1
    return code


def disturb(job: Job, process: subprocess.Popen[str], rng: random.Random, after: float | None, tally: Tally) -> None:
    """Send a random signal to a random rank: `after` so many seconds, or None: when so many rows are answered."""
    target = job.answered() + rng.randrange(ROWS * 9 // 10)
    started, number = time.monotonic(), rng.choice(SIGNALS)
    while process.poll() is None:
        ranks = job.ranks()
        if ranks and (time.monotonic() - started > after if after is not None else job.answered() >= target):
            pid = rng.choice(sorted(ranks))
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            tally.hits[f"{number.name} {'at work' if after is None else 'at the start'}"] += 1
            return
        time.sleep(0.02)


def texts_of_table(table: Path) -> dict[str, str]:
    """As `texts`."""
    rows = parquet.read_table(table).select(["custom_id", "text"]).to_pylist()
    found = {row["custom_id"]: row["text"] for row in rows}
    assert len(found) == len(rows), f"{len(rows) - len(found)} rows are in the table twice"
    return found


def texts(output: Path) -> dict[str, str]:
    """Answers by custom_id; each must be there once."""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}
    assert len(found) == len(rows), f"{len(rows) - len(found)} rows are answered twice"
    return found


def run(folder: Path, rows: Path, expected: dict[str, str], usual: str, rng: random.Random, tally: Tally) -> None:
    """One run of the campaign, on the topology `usual` to begin with.

    Raises:
        AssertionError: a row is lost or there twice, a text differs, or the job doesn't get done.
    """
    folder.mkdir()
    job, topology = Job(folder, rows), usual
    code = attempt(job, topology, rng, tally)
    for _ in range(20):
        if code == 0:
            break
        if rng.random() < 1 / 3:
            topology = rng.choice(OTHERS)
        tally.moved += topology != usual
        code = attempt(job, topology, rng if rng.random() < AGAIN else None, tally)
    assert code == 0, (folder / "stderr").read_text()[-3000:]
    got = texts(job.output)
    assert got.keys() == expected.keys(), f"{len(expected.keys() - got.keys())} rows are lost"
    assert got == expected, "texts differ"
    if job.table:
        assert texts_of_table(job.table) == expected, "the table differs from its answers"
    tally.runs += 1


def campaign(folder: Path, runs: int, seed: int, usual: str = "pp2dp2") -> Tally:
    """Run all of it below `folder`.

    Raises:
        AssertionError: see `run`; or processes were left over.
    """
    rng, tally = random.Random(seed), Tally()
    rows = folder / "in.jsonl"
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(ROWS)]
    rows.write_text(
        "".join(json.dumps({"custom_id": f"row {i}", "prompt": f"{a}+{b}="}) + "\n" for i, (a, b) in enumerate(pairs))
    )
    compressed = folder / "in.jsonl.gz"
    compressed.write_bytes(gzip.compress(rows.read_bytes()))
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    job = Job(undisturbed, rows)
    assert attempt(job, "single", None, Tally()) == 0, (undisturbed / "stderr").read_text()
    expected = texts(job.output)
    for number in range(runs):
        run(folder / f"run-{number}", compressed if number % 2 else rows, expected, usual, rng, tally)
        print(f"{number + 1}: {tally}", flush=True)
    assert not tally.left, str(tally)
    return tally


if __name__ == "__main__":
    runs, seed = [*map(int, sys.argv[1:]), *(100, 0)[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory(prefix="campaign") as folder:
        print(campaign(Path(folder), runs, seed))
