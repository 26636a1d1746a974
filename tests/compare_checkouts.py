"""Compares two checkouts byte for byte: the same jobs run in each, and what they leave must be equal.

    python tests/compare_checkouts.py OTHER_CHECKOUT [--work DIR] [--only NAME ...]

Jobs run on the CPU, one after the other, through each checkout's own launch/local.sh with the Python that runs this.
Of each, the output, its file of keys, the parts, the summary, the exit status and what was printed are compared, all
but times and rates. Then each checkout goes on with what the other one has left: cut, finished, with rows more and
fewer, with nothing to do. A line a comparison, and at the end how many differ; exit status 1 if any does.

NAME is a job (sums/pp2), a group of them (sums, broken, knobs) or resume. In DIR all files stay, to be looked at.

Both checkouts are reached through one symbolic link that is turned from one to the other between jobs. So the paths
that stand in answers and headers are the same, and so are digests of lines that hold them.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300.0  # seconds for a job
POLL = 0.02  # seconds
CUT_AT = 60  # answers after which a job is stopped
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STOPPED = 75  # exit status of a job that was stopped by a signal

# Keys of the summary that are times, or made of times.
OF_TIME = re.compile(r"duration|startup_seconds|exchange_us_per_tick|.*_throughput|.*_ms|.*_percent")
# The same on the terminal: numbers with a fraction, and the one time that is printed without.
TIMES = re.compile(r"\d[\d,]*\.\d+|\d[\d,]*(?= us/tick)")


@dataclass(frozen=True)
class Side:
    """One of the two checkouts."""

    name: str
    root: Path


@dataclass(frozen=True)
class Job:
    """What is run on both sides, alike."""

    name: str
    input: str
    options: tuple[str, ...]
    after: str = ""  # goes on with the output of this job


@dataclass(frozen=True)
class Run:
    """What a job left in its folder."""

    folder: Path
    status: int | None  # None: it had to be killed


@dataclass
class Tally:
    """Comparisons so far."""

    compared: int = 0
    differ: int = 0

    def tell(self, name: str, difference: str | None) -> None:
        self.compared += 1
        self.differ += difference is not None
        print(f"{name}: {f'differs: {difference}' if difference else 'equal'}", flush=True)


@dataclass(frozen=True)
class Place:
    """The folder for all files, and the link through which both checkouts are reached."""

    work: Path
    ours: Side
    other: Side
    spent: list[float] = field(default_factory=list)  # seconds, by job

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.ours, self.other

    @property
    def link(self) -> Path:
        return self.work / "checkout"

    def turn(self, side: Side) -> None:
        """Let the link lead to a side."""
        self.link.unlink(missing_ok=True)
        self.link.symlink_to(side.root)

    def python(self, side: Side, *arguments: str) -> str:
        """What one Python command prints."""
        self.turn(side)
        env = environment() | {"PYTHONPATH": str(self.link)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.work, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout

    def folder(self, name: str, like: Path | None = None) -> Path:
        """A folder for a job: empty, or a copy of what another job left, without what was kept of its files."""
        folder = self.work / name
        if like:
            shutil.copytree(like, folder, ignore=shutil.ignore_patterns("kept", "run", "*.summary.json"))
        else:
            folder.mkdir(parents=True)
        (folder / "kept").mkdir()
        return folder

    def run(self, side: Side, folder: Path, input: str, options: Sequence[str], cut: bool = False) -> Run:
        """Run a job to its end or, to `cut` it, until some rows are answered; parts are kept in `kept`."""
        self.turn(side)
        command = [str(self.link / "launch" / "local.sh"), "model=demo", "device=cpu", "progress=false"]
        command += [f"input={self.work / input}", "output=out.jsonl", "run_dir=run", *options]
        started = time.monotonic()
        with open(folder / "stdout", "w") as stdout, open(folder / "stderr", "w") as stderr:
            process = subprocess.Popen(
                command, cwd=folder, env=environment(), stdout=stdout, stderr=stderr, start_new_session=True
            )
            try:
                status = wait(process, folder, cut)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        self.spent.append(time.monotonic() - started)
        return Run(folder, status)


def environment() -> dict[str, str]:
    """For all jobs: one thread, and nothing that would lead to another checkout or another launcher."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SPMD_"))}
    env.pop("PYTHONPATH", None)
    return env | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def wait(process: subprocess.Popen[Any], folder: Path, cut: bool) -> int | None:
    """The exit status, or None if it takes too long. Keeps the parts, and stops the job if it is to be cut."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        keep(folder)
        if cut and answered(folder) >= CUT_AT:
            process.send_signal(signal.SIGTERM)
            cut = False
        time.sleep(POLL)
    keep(folder)
    return process.poll()


def keep(folder: Path) -> None:
    """Have a second link to each part, which stays when the output is complete and the part is removed."""
    for pattern in ("part-*.jsonl", "answered.jsonl"):
        for path in folder.glob(f"*.parts/{pattern}"):
            kept = folder / "kept" / path.name
            with contextlib.suppress(FileNotFoundError):  # removed just now
                if not kept.exists() or not kept.samefile(path):
                    kept.unlink(missing_ok=True)
                    os.link(path, kept)


def answered(folder: Path) -> int:
    """Lines of the newest parts, headers included."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "kept").glob("part-*.jsonl"))


# -- what is compared --------------------------------------------------------------------------------------------------


def whole(data: bytes) -> list[bytes]:
    return data.split(b"\n")


def header(line: bytes) -> bytes:
    """The first line of a file of answers or keys. "job" is torchrun's id of the launch, a random one each time."""
    try:
        made = json.loads(line)
        return json.dumps({key: value for key, value in made.items() if key != "job"}).encode()
    except (ValueError, AttributeError):
        return line


def keys(data: bytes) -> list[bytes]:
    first, *rest = data.split(b"\n")
    return [header(first), *rest]


def entries(data: bytes) -> list[bytes]:
    """Lines of a part, without the second column, the time at which the row was answered."""
    first, *rest = keys(data)
    columns = (line.split(b"\t") for line in rest)
    return [first, *(b"\t".join(line[:1] + line[2:]) for line in columns)]


def summary(data: bytes) -> list[bytes]:
    """Figures in their order, of those that are times the name alone."""
    figures = json.loads(data)
    return [f"{key}: {'...' if OF_TIME.fullmatch(key) else json.dumps(figures[key])}".encode() for key in figures]


def printed(data: bytes, folder: Path, all_figures: bool = False) -> list[bytes]:
    """Lines without times, or without `all_figures`, however wide these are."""
    text = data.decode().replace(str(folder), "FOLDER")
    text = (re.compile(r"\d[\d,.]*") if all_figures else TIMES).sub("#", text)
    return [" ".join(line.split()).encode() for line in text.splitlines()]


def told(data: bytes, folder: Path) -> list[bytes]:
    """Warnings and errors. What else is on stderr comes from libraries and holds ports, process ids and times."""
    return [line for line in printed(data, folder) if line.startswith((b"warning: ", b"error: "))]


def way(path: Path) -> Callable[[bytes], list[bytes]]:
    """How a file of this name is read for a comparison."""
    if path.name.endswith(".journal"):
        return keys
    if path.name.endswith(".unused") or path.parent.name == "kept":
        return entries
    return summary if path.name.endswith(".summary.json") else whole


def left(run: Run) -> dict[str, list[bytes]]:
    """All that a job left, as lines to compare, by name."""
    folder = run.folder
    found = {
        "exit status": [str(run.status).encode()],
        "stdout": printed((folder / "stdout").read_bytes(), folder, all_figures=run.status == STOPPED),
        "stderr": told((folder / "stderr").read_bytes(), folder),
    }
    paths = [path for path in sorted(folder.glob("out*")) if path.is_file()]
    for path in [*paths, *sorted((folder / "kept").iterdir())]:
        found[path.name] = way(path)(path.read_bytes())
    return found


def first_difference(name: str, ours: Sequence[bytes] | None, other: Sequence[bytes] | None) -> str | None:
    """The file, the first line that differs, and how; None: equal."""
    if ours is None or other is None:
        return f"{name}: {'not here, only there' if ours is None else 'only here, not there'}"
    for number, (one, two) in enumerate(zip(ours, other, strict=False), 1):
        if one != two:
            at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
            return f"{name}, line {number}: here {excerpt(one, at)}, there {excerpt(two, at)}"
    if len(ours) != len(other):
        return f"{name}, line {min(len(ours), len(other)) + 1}: here {len(ours)} lines, there {len(other)}"
    return None


def excerpt(line: bytes, at: int) -> str:
    """What stands around a place in a line."""
    start = max(0, at - 60)
    return repr(("..." if start else "") + line[start : at + 60].decode(errors="replace"))


def compare(tally: Tally, name: str, runs: Sequence[Run], files: Sequence[str] | None = None) -> None:
    """Compare all that two jobs left, or only some `files`."""
    here, there = map(left, runs)
    for file in files or dict.fromkeys([*here, *there]):
        tally.tell(f"{name}: {file}", first_difference(file, here.get(file), there.get(file)))


# -- rows --------------------------------------------------------------------------------------------------------------


def batch(custom_id: Any, url: Any, body: Any, **more: Any) -> bytes:
    """A batch request line."""
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | more).encode()


def question(rng: random.Random) -> str:
    return f"{rng.randrange(1000)}+{rng.randrange(1000)}="


def good_row(number: int, rng: random.Random) -> bytes:
    """A row of one of the forms."""
    text = question(rng)
    user = [{"role": "user", "content": text}]
    if number % 4 == 0:
        return batch(f"good {number}", TEXT, {"prompt": text, "max_tokens": 6, "temperature": 0})
    if number % 4 == 1:
        return batch(f"good {number}", CHAT, {"messages": user, "max_completion_tokens": 6, "temperature": 0})
    if number % 4 == 2:
        return json.dumps({"prompt": text, "max_tokens": 5, "seed": number}).encode()
    return json.dumps({"messages": user, "max_tokens": 4}).encode()


def broken_bodies() -> list[tuple[Any, Any]]:
    """URLs and bodies that can't be answered, each for another reason."""
    one, user = {"prompt": "1+1="}, [{"role": "user", "content": "1+1="}]
    image = {"type": "image_url", "image_url": "x"}
    bodies: list[Any] = [None, [], {}, {"messages": user}, one | {"min_tokens": 5, "max_tokens": 4}]
    prompts = ["", [], 5, ["a", "b"], [1, 16], [-1], [True], [5] * 64, "1" * 64, " ", None]
    messages = [[], "1+1=", ["1+1="], [{"content": "1"}], [{"role": 5, "content": "1"}], [{"role": "user"}]]
    messages += [[{"role": "user", "content": content}] for content in (5, [image], "", [{"type": "text"}])]
    of_chat: list[dict[str, Any]] = [
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": 5},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"logprobs": True, "top_logprobs": 21},
        {"top_logprobs": 2},
        {"logprobs": 5},
        {"best_of": 2, "prompt": "1"},
    ]
    of_text: dict[str, list[Any]] = {
        "top_logprobs": [2],
        "logprobs": [21, True],
        "temperature": [-1, "hot", True, float("nan"), float("inf")],
        "top_p": [0, 1.5],
        "top_k": [-2, 1.5],
        "min_p": [2],
        "repetition_penalty": [0],
        "presence_penalty": [3],
        "frequency_penalty": [-3],
        "n": [0, 100000],
        "max_tokens": [0, -4, "8"],
        "max_completion_tokens": [0],
        "seed": [2**63],
        "stop": [5, ["a", ""]],
        "stop_token_ids": [[16], "x"],
        "logit_bias": [{"x": 1}, {"5": 101}, [5]],
        "ignore_eos": [1],
        "priority": ["high"],
        "return_token_ids": ["yes"],
        "stream": [True],
        "tools": [[{"type": "function"}]],
        "response_format": [{"type": "json_object"}],
        "temprature": [0],
        "colour": ["red"],
        "messages": [user],
    }
    return [
        *((TEXT, {"prompt": prompt}) for prompt in prompts),
        *((CHAT, {"messages": said}) for said in messages),
        *((CHAT, {"messages": user} | more) for more in of_chat),
        *((TEXT, one | {key: value}) for key, values in of_text.items() for value in values),
        *((TEXT, body) for body in bodies),
        *((url, one) for url in ("/v1/embeddings", "https://example.com/v1/completions", "", None, 5, [CHAT])),
        (CHAT, one),
    ]


def broken_rows() -> list[bytes]:
    """At least a row for every kind of mistake."""
    lines = [
        b"{",
        b"hello",
        b"[1, 2]",
        b"null",
        b"\xff\xfe{}",
        b'{"prompt": "1+1=", "stop": "\xe9"}',
        b"{}",
        b'{"prompt": "1+1="} {}',
        b"[" * 5000,
        b'{"prompt": "' + b"1" * 2**24 + b'"}',  # a line that is too long
        b'{"prompt": "half a pair: \\ud800"}',
        b'{"custom_id": "\\udfff", "prompt": "1+1="}',
        b'{"prompt": "1+1=", "temperature": 1e999}',
        b'{"prompt": "1+1=", "seed": ' + b"9" * 5000 + b"}",
        b'{"custom_id": 7, "prompt": "1+1="}',
        b'{"custom_id": "", "prompt": "1+1="}',
        b'{"custom_id": "good 0", "prompt": "1+1="}',
        b'{"custom_id": "good 0", "prompt": ""}',
        b'{"custom_id": "row-3", "prompt": "1+1="}',  # the name that the fourth row gets, if it has none
        batch("beside", TEXT, {"prompt": "1+1="}, max_tokens=4),
        batch("colour", TEXT, {"prompt": "1+1="}, colour="red"),
        batch("get", TEXT, {"prompt": "1+1="}).replace(b"POST", b"GET"),
    ]
    return lines + [batch(f"bad {n}", url, body) for n, (url, body) in enumerate(broken_bodies())]


def mixed_rows(count: int, broken: int) -> bytes:
    """A file of good rows with `broken` ones among them, blank lines, other ends of lines, and a last without any."""
    rng = random.Random(1)
    bad = broken_rows()
    assert len(bad) <= broken, f"there are {len(bad)} ways to be broken"
    bad += [batch(f"worse {n}", TEXT, {"prompt": "1" * rng.randrange(64, 90)}) for n in range(broken - len(bad))]
    rng.shuffle(bad)
    at = set(rng.sample(range(4, count), broken))
    rows = [bad.pop() if place in at else good_row(place, rng) for place in range(count)]
    rows[9] += b"\r"
    rows[11] = b"\xef\xbb\xbf" + rows[11]
    for place in (700, 300, 2):
        rows[place:place] = [b"", b"  "]
    return b"\n".join(rows)


def knobs(number: int, rng: random.Random) -> dict[str, Any]:
    """Sampling keys: one or two kinds of each, and now and then some that go with all."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": rng.randrange(-100, 100)},
        {"temperature": 1.5, "top_k": rng.randrange(1, 8), "seed": number},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 1, "min_p": 0.1, "seed": 5},
        {"temperature": 1, "top_k": 6, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0.5, "presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"temperature": 0, "logit_bias": {"4": 5, "7": -100, "1": -20}},
        {"temperature": 0.005, "min_tokens": rng.randrange(1, 12)},
        {"temperature": 1, "n": rng.randrange(2, 5), "seed": number},
        {"temperature": 0, "n": 2, "stop": "1"},
        {"temperature": 1, "stop": ["12", "9+", "3"], "include_stop_str_in_output": number % 2 == 0},
        {"temperature": 0.7, "stop_token_ids": [5, 9], "include_stop_str_in_output": number % 2 == 1},
        {"temperature": 0, "ignore_eos": True, "skip_special_tokens": number % 2 == 0},
        {"temperature": 0.9, "ignore_eos": True, "min_tokens": 4, "stop": "0", "logit_bias": {"2": -50}},
    ]
    chosen = kinds[number % len(kinds)]
    if rng.random() < 0.3:
        chosen |= {"return_token_ids": True}
    if rng.random() < 0.5:
        chosen |= {"priority": rng.randrange(-3, 4)}
    if number % 7:  # else until there is no room
        chosen |= {"max_tokens": rng.randrange(12, 24)}
    return chosen


def knob_row(number: int, rng: random.Random) -> bytes:
    """A row that samples in its own way; every third prompt is long."""
    chosen = knobs(number, rng)
    text = question(rng) if number % 3 else "12+34=46" * rng.randrange(3, 6) + question(rng)
    if number % 5 in (0, 3):
        if number % 2:
            chosen |= {"logprobs": True, "top_logprobs": rng.randrange(0, 6)}
        return batch(f"knobs {number}", CHAT, chosen | {"messages": [{"role": "user", "content": text}]})
    if number % 2:
        chosen |= {"logprobs": rng.randrange(0, 6)}
    if number % 5 == 1:
        return json.dumps(chosen | {"prompt": text}).encode()
    if number % 5 == 2:
        return batch(f"knobs {number}", TEXT, chosen | {"prompt": [rng.randrange(16) for _ in text]})
    return batch(f"knobs {number}", TEXT, chosen | {"prompt": text, "user": "me", "metadata": {"row": number}})


def knob_rows(count: int) -> bytes:
    rng = random.Random(2)
    return b"".join(knob_row(number, rng) + b"\n" for number in range(count))


def plain_rows(first: int, count: int) -> list[bytes]:
    """Rows of one length and a few broken ones, which all stand at the beginning.

    A broken row is answered when it is read. Behind a cut none is read any more, but what is in flight is still
    answered: broken rows further back would stand in another order there.
    """
    rng = random.Random(first)
    rows = [batch(f"row {first}-{n}", TEXT, {"prompt": "", "max_tokens": n + 1}) for n in range(3)]
    for number in range(count):
        more = {"temperature": 0.8, "seed": number} if number % 3 == 0 else {}
        rows.append(batch(f"row {first + number}", TEXT, {"prompt": question(rng)} | more))
    return rows


def write_inputs(place: Place, tally: Tally) -> None:
    """All inputs; that of the demo as each checkout writes it."""
    found = []
    for side in place.sides:
        place.python(side, "-m", "spmd.demo.prompts", "write", "sums.jsonl")
        found.append(whole((place.work / "sums.jsonl").read_bytes()))
    tally.tell("inputs", first_difference("sums.jsonl", *found))
    (place.work / "broken.jsonl").write_bytes(mixed_rows(1000, 110))
    (place.work / "knobs.jsonl").write_bytes(knob_rows(150))
    rows = plain_rows(0, 300)
    (place.work / "plain.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    # For a finished output: some rows are new, some gone, and the others stand elsewhere.
    changed = [*rows[200:], *plain_rows(1000, 60), *rows[20:200]]
    (place.work / "changed.jsonl").write_bytes(b"\n".join(changed) + b"\n")


# -- jobs --------------------------------------------------------------------------------------------------------------

FEW = "scheduler.max_num_seqs=16"
PREEMPTED = ("scheduler.block_size=4", "scheduler.num_blocks=48", FEW)
CHUNKED = ("scheduler.max_num_batched_tokens=24", "scheduler.prefill_spread=0")
PLAIN = ("model.dtype=float32", "sampling.temperature=0", "sampling.max_tokens=20", "sampling.ignore_eos=true", FEW)


def sums_jobs() -> Iterator[Job]:
    for topology in ("single", "pp2", "pp4", "tp2", "dp2", "pp2dp2"):
        options = (f"topology={topology}", "sampling.max_tokens=8", "sampling.temperature=0")
        yield Job(f"sums/{topology}", "sums.jsonl", options)


def broken_jobs() -> Iterator[Job]:
    yield Job("broken/single", "broken.jsonl", ("topology=single",))
    yield Job("broken/retried", "broken.jsonl", ("topology=single", "resume=retry_errors"), after="broken/single")
    yield Job("broken/pp2", "broken.jsonl", ("topology=pp2", "scheduler.lookahead=0", "output_order=completion"))
    yield Job("broken/dp2", "broken.jsonl", ("topology=dp2", "balance.share=static"))


def knobs_jobs() -> Iterator[Job]:
    """Named by the topology or, on a single rank, by what is special in the scheduler."""
    ways: dict[str, tuple[str, ...]] = {
        "single": ("topology=single",),
        "chunked": ("topology=single", *CHUNKED, *PREEMPTED),
        "priority": ("topology=single", "scheduler.policy=priority", "scheduler.num_blocks=12", FEW),
        "exclusive": (
            *("topology=single", "scheduler.prefill=exclusive", "scheduler.prefill_batch=4", "scheduler.lookahead=1"),
            *("scheduler.decode_buckets=[1,2,4]", "scheduler.prefix_caching=false", "scheduler.max_num_seqs=8"),
            *("shard=[1,2]", "output_order=completion", "model.dtype=float32", "sampling.logprobs=1"),
            *("sampling.top_k=9", "sampling.seed=7", 'sampling.stop=["99","+"]'),
        ),
        "pp2": (
            *("topology=pp2", "scheduler.async_depth=1", "scheduler.prefill_spread=4", "scheduler.prefill_min=4"),
            *("scheduler.policy=priority", *PREEMPTED),
        ),
        "pp4": ("topology=pp4", *PREEMPTED),
        "tp2": ("topology=tp2", *CHUNKED, FEW),
        "dp2": ("topology=dp2", "balance.gate=saturated", "scheduler.max_num_seqs=6"),
    }
    for name, options in ways.items():
        yield Job(f"knobs/{name}", "knobs.jsonl", options)


def run_jobs(place: Place, tally: Tally, jobs: Sequence[Job]) -> None:
    """Run each on both sides and compare what it leaves."""
    for job in jobs:
        runs = []
        for side in place.sides:
            like = place.work / job.after / side.name if job.after else None
            folder = place.folder(f"{job.name}/{side.name}", like)
            runs.append(place.run(side, folder, job.input, job.options))
        compare(tally, job.name, runs)


def chosen(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs of these names or groups, and those that they go on from."""
    named = [job for job in jobs if not only or {job.name, job.name.partition("/")[0]} & set(only)]
    needed = {job.after for job in named}
    return [job for job in jobs if job in named or job.name in needed]


# -- each goes on with what the other has left -------------------------------------------------------------------------

OUTPUT = ("out.jsonl", "out.jsonl.journal")
# Of a job with nothing to do. Its parts are there for a moment only, in which they may be kept or not.
NO_PARTS = ("exit status", "stdout", "stderr", *OUTPUT)


def resume(place: Place, tally: Tally) -> None:
    """Cut and finished outputs of each side, and what both make of them."""
    options = ("topology=pp2", *PLAIN)
    finished = [
        place.run(side, place.folder(f"resume/undisturbed/{side.name}"), "plain.jsonl", options) for side in place.sides
    ]
    compare(tally, "resume/undisturbed", finished)
    cut = [
        place.run(side, place.folder(f"resume/cut/{side.name}"), "plain.jsonl", options, cut=True)
        for side in place.sides
    ]
    compare_cut(tally, "resume/cut", cut)
    for side, run, undisturbed in zip(place.sides, cut, finished, strict=True):
        finish(place, tally, f"resume/cut-{side.name}", run, undisturbed)
    change(place, tally, finished)
    nothing_to_do(place, tally, finished)
    refused = go_on(place, "resume/refused", finished[::-1], "plain", ("topology=single", *PLAIN, "sampling.top_k=3"))
    compare(tally, "resume/refused", refused)


def go_on(place: Place, name: str, runs: Sequence[Run], input: str, options: Sequence[str]) -> list[Run]:
    """Ours goes on with a copy of what the first of two jobs left, the other side with the second's."""
    return [
        place.run(side, place.folder(f"{name}/{side.name}", run.folder), f"{input}.jsonl", options)
        for side, run in zip(place.sides, runs, strict=True)
    ]


def compare_cut(tally: Tally, name: str, runs: Sequence[Run]) -> None:
    """Two jobs that were stopped, never at the same row: one part must begin with the other."""
    compare(tally, name, runs, ["exit status", "stdout", "stderr", "answered.jsonl"])
    # Behind the last answer stands the empty line after its end.
    here, there = (left(run).get("part-0.jsonl", [])[:-1] for run in runs)
    shorter = min(len(here), len(there))
    enough = shorter >= CUT_AT and all(run.status == STOPPED for run in runs)
    difference = first_difference("part-0.jsonl", here[:shorter], there[:shorter])
    tally.tell(f"{name}: part-0.jsonl", difference if enough else "the jobs were not cut midway")


def finish(place: Place, tally: Tally, name: str, cut: Run, undisturbed: Run) -> None:
    """Both sides finish one side's job that was cut: alike, and as if it hadn't been."""
    runs = go_on(place, name, (cut, cut), "plain", ("topology=pp2", *PLAIN))
    compare(tally, name, runs)
    # Of one and the same part each has made this file, so here even times are equal, and the header's job is.
    paths = [run.folder / "kept" / "answered.jsonl" for run in runs]
    collected = [whole(path.read_bytes()) if path.exists() else None for path in paths]
    tally.tell(f"{name}: answered.jsonl with times", first_difference("answered.jsonl", *collected))
    for side, run in zip(place.sides, runs, strict=True):
        compare(tally, f"{name}-by-{side.name} as undisturbed", (run, undisturbed), OUTPUT)


def change(place: Place, tally: Tally, finished: Sequence[Run]) -> None:
    """Each adds to the other's finished output, whose input has changed; then the input changes back.

    Finished outputs are equal, or were told not to be: what each makes of its own would be no news.
    """
    options = ("topology=single", *PLAIN)
    runs = go_on(place, "resume/changed", finished[::-1], "changed", options)
    compare(tally, "resume/changed", runs)
    back = go_on(place, "resume/back", runs[::-1], "plain", options)
    compare(tally, "resume/back", back, [*NO_PARTS, "out.jsonl.unused"])
    compare(tally, "resume/back as before", (back[0], finished[0]), OUTPUT)


def nothing_to_do(place: Place, tally: Tally, finished: Sequence[Run]) -> None:
    """Each finds that the other's finished output is finished, and leaves it as it is."""
    runs = go_on(place, "resume/again", finished[::-1], "plain", ("topology=single", *PLAIN))
    compare(tally, "resume/again", runs, NO_PARTS)
    for side, run, before in zip(place.sides, runs, finished[::-1], strict=True):
        compare(tally, f"resume/again-by-{side.name} as before", (run, before), ("exit status", *OUTPUT))
        begins = left(run)["stdout"][:1] or [b""]
        wrong = None if begins[0].startswith(b"nothing to do") else f"stdout, line 1: {begins[0].decode()!r}"
        tally.tell(f"resume/again-by-{side.name}: nothing to do", wrong)


# -- all of it ---------------------------------------------------------------------------------------------------------


def check_sides(place: Place) -> None:
    """See that each side's jobs will run its own code: one that is installed would be compared with itself.

    Raises:
        SystemExit: they don't.
    """
    for side in place.sides:
        found = place.python(side, "-c", "import os, spmd; print(os.path.realpath(spmd.__file__))").strip()
        if Path(found) != side.root / "spmd" / "__init__.py":
            sys.exit(f"error: jobs of {side.root} would run {found}")


def run_all(work: Path, other: Path, only: Sequence[str]) -> Tally:
    """Run and compare what is asked for."""
    place, tally, started = Place(work, Side("ours", ROOT), Side("other", other)), Tally(), time.monotonic()
    check_sides(place)
    write_inputs(place, tally)
    run_jobs(place, tally, chosen([*sums_jobs(), *broken_jobs(), *knobs_jobs()], only))
    if not only or "resume" in only:
        resume(place, tally)
    print(f"{len(place.spent)} jobs in {time.monotonic() - started:,.0f} s", file=sys.stderr)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a new or empty folder; without it none stays")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="a group, a job of one, or resume")
    args = parser.parse_args()
    known = {job.name for job in (*sums_jobs(), *broken_jobs(), *knobs_jobs())}
    known |= {name.partition("/")[0] for name in known} | {"resume"}
    if unknown := set(args.only) - known:
        parser.error(f"--only {' '.join(sorted(unknown))}: none of {', '.join(sorted(known))}")
    if args.work and args.work.exists() and any(args.work.iterdir()):
        parser.error(f"--work {args.work} is not empty")
    if not (args.other / "launch" / "local.sh").is_file():
        parser.error(f"{args.other} is no checkout: it has no launch/local.sh")
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare")))
        work.mkdir(parents=True, exist_ok=True)
        tally = run_all(work.resolve(), args.other.resolve(), args.only)
    print(f"{tally.compared} compared, {tally.differ} differ")
    sys.exit(tally.differ > 0)


if __name__ == "__main__":
    main()
