"""The main job end to end: files in, files out, figures, errors and run directory, as a person meets them."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spmd.api.answers import Head
from spmd.api.prompts import BEGUN_TWICE
from spmd.journal.paths import Paths
from spmd.journal.writer import PartWriter
from spmd.processes.outlet import Outlet
from spmd.stage import build
from tests.support.attempts import enlarge, small_disk
from tests.support.broken_rows import make_rows
from tests.support.checkpoints import write_checkpoint
from tests.support.jobs import ROOT, alive, bodies, launcher, read_rows, run, run_here, start, torchrun, write_rows
from tests.support.ranks import Ranks
from tests.support.slurm_cluster import until
from tests.support.tiny_tokenizer import make_tokenizer

DEMO = ("model=demo", "model.dtype=float32")  # few CPUs compute in bfloat16 without detours
GREEDY = ("sampling.temperature=0", "progress=false")
ERROR = re.compile(r"^error: .*$", re.MULTILINE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of 64 positions with the tiny tokenizer, for which the broken rows are made."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder)
    return write_checkpoint(folder, "Qwen3ForCausalLM", vocab_size=269, max_position_embeddings=64)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 rows, 100 of them broken."""
    path = tmp_path_factory.mktemp("broken") / "in.jsonl"
    path.write_bytes(b"".join(make_rows(900, 100)))
    return path


@pytest.fixture(scope="module")
def answers(model: str, broken: Path) -> bytes:
    """What one rank makes of the broken rows, in input order."""
    output = broken.parent / "answers.jsonl"
    assert run_here(*GREEDY, *job(model, broken, output)) == 0
    return output.read_bytes()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty but for an input of one row."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", [{"prompt": "1+2="}])
    return tmp_path


def job(model: str, input: Path, output: Path) -> tuple[str, ...]:
    return f"model.path={model}", f"input={input}", f"output={output}", f"run_dir={output.parent / 'run'}"


def on_rank(rank: int, *overrides: str) -> tuple[int, str]:
    """One rank of a job: its exit status and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = run_here(*overrides)
    return status, printed.getvalue()


def sums(count: int, **body: Any) -> list[dict[str, Any]]:
    """Rows the demo model answers."""
    return [{"custom_id": f"sum-{i}", "prompt": f"{i % 1000}+{i * 7 % 1000}="} | body for i in range(count)]


# -- good and bad rows ------------------------------------------------------------------------------------------------


def test_bad_rows_become_error_lines_and_the_others_are_answered(
    model: str, broken: Path, answers: bytes, tmp_path: Path, ranks: Ranks
) -> None:
    told = ranks.run(2, on_rank, "topology=pp2", *GREEDY, *job(model, broken, tmp_path / "out.jsonl"))
    assert [status for status, _ in told] == [0, 0], told
    assert (tmp_path / "out.jsonl").read_bytes() == answers
    assert re.search(r"^rows +900 ok +100 failed ", told[0][1], re.MULTILINE)
    figures = json.loads((tmp_path / "out.summary.json").read_text())
    assert (figures["completed"], figures["failed"]) == (900, 100)
    assert len(figures["stage_busy_percent"]) == 2
    rows = read_rows(tmp_path / "out.jsonl")
    failed = [row for row in rows if row["error"]]
    assert len(failed) == 100 and len({row["error"]["message"] for row in failed}) >= 20
    assert all(row["response"]["status_code"] == 400 for row in failed)
    assert all(row["response"]["body"]["error"]["message"] == row["error"]["message"] for row in failed)
    assert all(row["response"]["status_code"] == 200 for row in rows if not row["error"])


def test_answers_stand_in_the_order_of_the_input(broken: Path, answers: bytes) -> None:
    asked = []
    for index, line in enumerate(broken.read_bytes().splitlines()):
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            asked.append((index, json.loads(line).get("custom_id")))
    answered = [json.loads(line)["custom_id"] for line in answers.splitlines()]
    named = [(index, name) for index, name in asked if isinstance(name, str)]
    assert len(named) > 500
    assert [name for _, name in named] == [answered[index] for index, _ in named]


def test_completion_order_and_replicas_change_no_answer(
    model: str, broken: Path, answers: bytes, tmp_path: Path, ranks: Ranks
) -> None:
    output = tmp_path / "out.jsonl"
    overrides = ("topology=pp2dp2", *GREEDY, *job(model, broken, output))
    told = ranks.run(4, on_rank, *overrides)
    assert [status for status, _ in told] == [0, 0, 0, 0]
    assert "900 ok" in told[0][1] and not any(text for _, text in told[1:])
    assert output.read_bytes() == answers
    ranks.run(4, on_rank, *overrides, "output_order=completion", "resume=fresh")
    as_finished = output.read_bytes()
    assert sorted(as_finished.splitlines()) == sorted(answers.splitlines())
    assert as_finished != answers
    assert not parts_of(output).exists()


def test_bad_rows_do_not_end_the_run_and_answers_are_written_as_they_finish(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sums(2000, max_tokens=2)
    rows[100] = {"custom_id": "too long", "prompt": "1+" * 100}
    write_rows(here / "in.jsonl", rows)
    with open(here / "in.jsonl", "a") as file:
        file.write('{"prompt": "1+1=", \n')
    part, send, flush = parts_of(here / "out.jsonl") / "part-0.jsonl", Outlet.answer, Outlet.flush
    sent: list[int] = []
    looks: list[int] = []

    def answer(self: Outlet, head: Head) -> None:
        send(self, head)
        sent.append(head.row)

    def flushed(self: Outlet, **most: int) -> None:
        flush(self, **most)
        if len(sent) > 100 * (1 + len(looks)) and len(looks) < 5:  # the loop stands still meanwhile
            looks.append(len(sent))
            until(lambda: part.read_bytes().count(b"\n") > len(sent), "answers in the part", timeout=20)

    monkeypatch.setattr(Outlet, "answer", answer)
    monkeypatch.setattr(Outlet, "flush", flushed)
    assert run_here(*DEMO, "input=in.jsonl", "output=out.jsonl", "scheduler.max_num_seqs=16", *GREEDY) == 0
    assert len(looks) == 5 and len(sent) == 1999
    answered = {row["custom_id"]: row["error"] and row["error"]["code"] for row in read_rows(here / "out.jsonl")}
    assert len(answered) == 2001
    assert {key: code for key, code in answered.items() if code} == {
        "too long": "context_length_exceeded",
        "row-2000": "invalid_json",
    }


def test_rows_as_other_servers_take_them_are_answered_and_errors_stand_apart(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chat = {"messages": [{"role": "user", "content": "12+34="}]}
    rows: list[dict[str, Any]] = [
        {"custom_id": "alone", "prompt": "5+6="},
        {"custom_id": "list", "url": "/completions", "body": {"prompt": ["5+6=", [4, 5, 13, 6, 14]], "n": 2}},
        {"custom_id": "row-3", "body": chat | {"parallel_tool_calls": False, "priority": 3}},
        {"prompt": "5+6="},
        {"custom_id": "a\u2028b", "prompt": "5+6=", "tools": [{}]},
        {"custom_id": "c\u0085d", "prompt": "5+6="},
        {"custom_id": "alone", "prompt": "5+6="},
    ]
    write_rows(here / "in.jsonl", rows)
    start = (*DEMO, *GREEDY, "input=in.jsonl", "output=out.jsonl", "errors=bad/errors.jsonl")
    for _ in range(2):
        assert run_here(*start) == 0
        lines = (here / "out.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["custom_id"] for line in lines] == [
            *("alone", "list", "row-3", "row-3_", "a\u2028b", "c\u0085d", "alone")
        ]
        assert (here / "bad" / "errors.jsonl").read_text(encoding="utf-8").splitlines() == [lines[4], lines[6]]
    answered = [json.loads(line)["response"] for line in lines]
    assert [response["status_code"] for response in answered] == [200] * 4 + [400, 200, 400]
    assert answered[4]["body"]["error"]["type"] == "invalid_request_error"
    alone, several = answered[0]["body"]["choices"], answered[1]["body"]["choices"]
    assert [(c["index"], c["text"]) for c in several] == [(0, alone[0]["text"])] + [
        (index, several[index]["text"]) for index in (1, 2, 3)
    ]
    assert several[1]["text"] == alone[0]["text"] == "11" and several[2]["text"] == several[3]["text"]
    out = capfd.readouterr().out
    assert (
        "priority: not looked at in 1 rows; scheduler.policy=priority does" in out and "errors: bad/errors.jsonl" in out
    )


def test_a_second_beginning_of_sequence_is_told(model: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(here / "in.jsonl", [{"prompt": prompt, "max_tokens": 1} for prompt in ("a", "<bos>b", "<bos>c")])
    assert run_here(*GREEDY, *job(model, here / "in.jsonl", here / "out.jsonl")) == 0
    assert f"warning: {BEGUN_TWICE.format(2)}\n" in capfd.readouterr().err


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    children = []
    for count in (200, 10_000):
        write_rows(tmp_path / f"{count}.jsonl", sums(count, max_tokens=1))
        overrides = (*DEMO, f"input={count}.jsonl", f"output={count}.out", f"run_dir=run-{count}", *GREEDY)
        children.append(start([sys.executable, str(ROOT / "tests" / "support" / "peak.py"), *overrides], tmp_path))
    peaks = []
    for child in children:
        printed, told = child.communicate(timeout=120)
        assert child.returncode == 0, told
        peaks.append(int(printed.split()[-1]))
    assert re.search("^rows +10,000 ok", printed, re.MULTILINE)
    assert peaks[1] - peaks[0] < 30 * 2**20


# -- what a client gets -----------------------------------------------------------------------------------------------


def test_every_kind_of_row_on_two_stages(here: Path) -> None:
    """Through the launcher, with a stop string that holds =, |, a space and a comma, quoted as the README says."""
    chat = {"method": "POST", "url": "/v1/chat/completions"}
    asked = [{"role": "user", "content": "347+218="}]
    rows: list[dict[str, Any]] = [
        {"custom_id": "text", "prompt": "347+218="},
        {"custom_id": "ids", "prompt": [6, 7, 10, 13, 5, 4, 11, 14], "return_token_ids": True},
        {"custom_id": "stop", "prompt": "347+218=", "stop": ["6"]},
        {"custom_id": "kept", "prompt": "347+218=", "stop": ["6"], "include_stop_str_in_output": True},
        {"custom_id": "stop id", "prompt": "347+218=", "stop_token_ids": [9]},
        {"custom_id": "short", "prompt": "347+218=", "max_tokens": 2},
        {"custom_id": "three", "prompt": "347+218=", "n": 3, "temperature": 5, "seed": 7, "logprobs": 2},
        {"custom_id": "again", "prompt": "347+218=", "n": 3, "temperature": 5, "seed": 8},
        {"custom_id": "default stop", "prompt": "347+218", "logit_bias": {"14": 100}, "max_tokens": 3},
        {"custom_id": "chat", **chat, "body": {"messages": asked, "logprobs": True, "top_logprobs": 2}},
        {"custom_id": "chat ids", **chat, "body": {"messages": asked, "return_token_ids": True, "priority": -1}},
    ]
    write_rows(here / "in.jsonl", rows)
    stop = """sampling.stop=["==", "a|b=c, d"]"""
    overrides = ("topology=pp2", *DEMO, "scheduler.policy=priority", "input=in.jsonl", "output=out.jsonl", stop)
    done = run(launcher(*overrides, *GREEDY), here)
    assert done.returncode == 0, done.stderr
    got = bodies(here / "out.jsonl")
    choice = {key: body["choices"][0] for key, body in got.items()}

    text = got["text"]
    assert text["object"] == "text_completion" and text["id"].startswith("cmpl-")
    assert text["usage"] == {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}
    assert text["choices"] == [
        {"index": 0, "text": "565", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert choice["ids"]["text"] == "565"
    assert choice["ids"]["prompt_token_ids"] == rows[1]["prompt"] and choice["ids"]["token_ids"] == [8, 9, 8, 1]
    assert (choice["stop"]["text"], choice["stop"]["stop_reason"]) == ("5", "6")
    assert (choice["kept"]["text"], choice["kept"]["stop_reason"]) == ("56", "6")
    assert (choice["stop id"]["text"], choice["stop id"]["stop_reason"]) == ("5", 9)
    assert (choice["short"]["text"], choice["short"]["finish_reason"]) == ("56", "length")
    assert (choice["default stop"]["text"], choice["default stop"]["stop_reason"]) == ("", "==")

    three = got["three"]
    assert [c["index"] for c in three["choices"]] == [0, 1, 2]
    assert len({c["text"] for c in three["choices"]}) > 1  # at this temperature almost anything may come
    assert three["usage"]["prompt_tokens"] == 8
    assert three["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in three["choices"])
    assert [c["text"] for c in got["again"]["choices"]] != [c["text"] for c in three["choices"]]
    for c in three["choices"]:
        logprobs = c["logprobs"]
        assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert len({len(values) for values in logprobs.values()}) == 1
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == logprob <= 0 and 2 <= len(top) <= 3

    assert got["chat"]["object"] == "chat.completion" and got["chat"]["id"].startswith("chatcmpl-")
    assert choice["chat"]["message"] == {"role": "assistant", "content": "565"}
    content = choice["chat"]["logprobs"]["content"]
    assert [entry["token"] for entry in content[:3]] == ["5", "6", "5"]
    assert content[0]["bytes"] == [53] and len(content[0]["top_logprobs"]) == 2
    assert content[0]["top_logprobs"][0]["logprob"] == content[0]["logprob"]  # greedy
    assert got["chat ids"]["prompt_token_ids"] == rows[1]["prompt"]
    assert choice["chat ids"]["token_ids"] == [8, 9, 8, 1]


def test_sampled_answers_do_not_depend_on_the_topology(here: Path, ranks: Ranks) -> None:
    write_rows(here / "in.jsonl", sums(40, temperature=3.0, n=2, logprobs=1, max_tokens=6))
    common = (*DEMO, f"input={here}/in.jsonl", f"run_dir={here}/run", "progress=false")
    assert run_here(*common, "output=one.jsonl") == 0
    ranks.run(2, on_rank, *common, "topology=pp2", f"output={here}/two.jsonl", "scheduler.max_num_seqs=7")
    one, two = bodies(here / "one.jsonl"), bodies(here / "two.jsonl")
    assert [[c["text"] for c in body["choices"]] for body in one.values()] == [
        [c["text"] for c in body["choices"]] for body in two.values()
    ]


def test_an_error_of_the_loop_that_is_no_mistake_of_the_user_is_a_crash(here: Path) -> None:
    """A ValueError of a library: exit status 1 with its traceback, so that SLURM queues the job again."""
    (here / "failing.py").write_text(
        "from spmd.generate import cli\nfrom spmd.leader import Leader\n"
        "def failing(self, *args): raise ValueError('Out of range float values are not JSON compliant')\n"
        "Leader.finish = failing\ncli()\n"
    )
    command = torchrun(1, *DEMO, *GREEDY, "input=in.jsonl", "output=out.jsonl", "run_dir=run")
    place = command.index("-m", 3)
    done = run([*command[:place], "failing.py", *command[place + 2 :]], here)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: Out of range float values" in done.stderr
    assert not ERROR.search(done.stderr)


# -- runs over the same files -----------------------------------------------------------------------------------------


def test_one_run_directory_for_all_ranks(here: Path) -> None:
    """Raw torchrun, run_dir left to rank 0, in a folder that isn't the project's; a warning is told once, too."""
    overrides = ("topology=pp2", *DEMO, "input=in.jsonl", "output=out.jsonl", "scheduler.max_num_seqs=17", *GREEDY)
    done = run(torchrun(2, *overrides), here)
    assert done.returncode == 0, done.stderr
    files = ["in.jsonl", "out.jsonl", "out.jsonl.journal", "out.summary.json", "runs"]
    assert sorted(path.name for path in here.iterdir()) == files
    [run_dir] = (here / "runs").iterdir()
    assert sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*")) == [
        "config.yaml",
        "logs",
        "logs/rank-0.log",
        "logs/rank-1.log",
    ]
    for rank in range(2):
        log = (run_dir / "logs" / f"rank-{rank}.log").read_text()
        assert f"rank {rank} of 2: dp0/pp{rank}/tp0" in log and f"rank {1 - rank} of 2" not in log
    assert done.stdout.count("rows ") == 1
    assert re.findall("^warning: .*", done.stderr, re.MULTILINE) == [
        "warning: scheduler.max_num_seqs=17 is no multiple of topology.pp=2: at most 16 requests decode at once; "
        "16 or 18 wastes no seat"
    ]


def cut(run: Callable[[], object], after: int) -> list[int]:
    """A run in this process that is cut after so many answers; the rows that were answered."""
    answer = Outlet.answer
    written: list[int] = []

    def until_cut(self: Outlet, head: Head) -> None:
        if len(written) == after:
            raise KeyboardInterrupt
        answer(self, head)
        written.append(head.row)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Outlet, "answer", until_cut)
        run()
    return written


def test_resume_goes_by_content_over_a_torn_line_on_another_topology(here: Path, ranks: Ranks) -> None:
    rows = sums(40)
    write_rows(here / "in.jsonl", rows)
    common = (*DEMO, f"input={here}/in.jsonl", f"run_dir={here}/run", *GREEDY)
    removed, changed, *kept = cut(lambda: run_here(*common, "output=out.jsonl"), 15)
    with open(parts_of(here / "out.jsonl") / "part-0.jsonl", "a") as part:
        part.write('39\t1\tab\t{"torn')
    rows[changed] = rows[changed] | {"max_tokens": 1}
    del rows[removed]
    write_rows(here / "in.jsonl", [{"custom_id": "new", "prompt": "1+2="}, *reversed(rows)])
    [(status, told), _] = ranks.run(2, on_rank, "topology=dp2", *common, f"output={here}/out.jsonl")
    assert status == 0, told
    assert f"resumed: {len(kept)} more rows were done by earlier runs" in told
    assert f"put aside: 2 answers of rows that are not in the input now, in {here}/out.jsonl.unused" in told
    assert not parts_of(here / "out.jsonl").exists()
    assert run_here(*common, "output=fresh.jsonl", "resume=fresh") == 0
    assert (here / "out.jsonl").read_bytes() == (here / "fresh.jsonl").read_bytes()


def test_a_finished_output_is_gone_on_from_and_only_by_the_same_model_and_sampling(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(here / "in.jsonl", sums(5))
    common = (*DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    assert run_here(*common) == 0
    first = (here / "out.jsonl").read_text().splitlines()
    figures = (here / "out.summary.json").read_bytes()
    write_rows(here / "in.jsonl", [*sums(7)[:4:-1], *sums(3)])
    assert run_here(*common, "model.max_model_len=64", "scheduler.max_num_seqs=3") == 0  # 64 is the model's own
    assert "resumed: 3 more rows" in capfd.readouterr().out
    second = (here / "out.jsonl").read_text().splitlines()
    assert second[2:] == first[:3] and [json.loads(line)["custom_id"] for line in second[:2]] == ["sum-6", "sum-5"]
    assert run_here(*common, "sampling.n=2", "model.dtype=float16") == 2
    told = capfd.readouterr().err
    assert 'model.dtype was "float32", is "float16"; sampling.n was 1, is 2; choose another output, or res' in told
    with monkeypatch.context() as patched:
        patched.setattr(build, "load", None)  # weights are not even loaded
        write_rows(here / "in.jsonl", sums(6))
        assert run_here(*common) == 0
    told = capfd.readouterr().out
    assert (
        told == f"nothing to do: all 6 rows were done by earlier runs\nput aside: 1 answers of rows that are not "
        f"in the input now, in {here}/out.jsonl.unused\nanswers: out.jsonl\n"
    )
    assert (here / "out.jsonl").read_text().splitlines() == [*first, second[1]]
    assert (here / "out.summary.json").read_bytes() != figures
    (here / "out.jsonl").unlink()
    assert run_here(*common) == 0
    assert "resumed" not in capfd.readouterr().out
    assert (here / "out.jsonl").read_text().splitlines() == [*first, second[1]]


def test_a_job_that_is_requeued_starts_afresh_only_once(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(here / "in.jsonl", sums(9))
    common = (*DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    assert run_here(*common) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    cut(lambda: run_here(*common, "resume=fresh"), 5)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_here(*common, "resume=fresh") == 0
    assert "resumed: 5 more rows" in capfd.readouterr().out


def test_rows_that_failed_are_passed_over_or_tried_again(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(
        here / "in.jsonl", [*sums(3), {"custom_id": "bad", "prompt": 5}, {"custom_id": "long", "prompt": "1" * 63}]
    )
    common = (*DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    assert run_here(*common, "scheduler.num_blocks=4") == 0
    first = (here / "out.jsonl").read_text()
    assert re.search(r"^rows +3 ok +2 failed", capfd.readouterr().out)
    assert run_here(*common) == 0
    assert "nothing to do: all 5 rows" in capfd.readouterr().out
    assert (here / "out.jsonl").read_text() == first
    assert run_here(*common, "resume=retry_errors") == 0  # and with room enough for the long one
    assert re.search(r"^rows +1 ok +1 failed", capfd.readouterr().out)
    second = (here / "out.jsonl").read_text()
    assert second.splitlines()[:4] == first.splitlines()[:4] and second != first


@pytest.mark.parametrize(
    "more",
    [b"\n\n  \n", b'{"custom_id": "sum-0", "prompt": "5+5="}\n', b"not JSON\n", b"[1]"],
    ids=["blank lines", "a duplicate id", "no JSON", "no object, no end of line"],
)
def test_nothing_to_do_is_known_before_weights_load(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], more: bytes
) -> None:
    """Whatever else is in the input that no model could answer; the output is the one that a model's run leaves."""
    write_rows(here / "in.jsonl", sums(2, max_tokens=2))
    with open(here / "in.jsonl", "ab") as file:
        file.write(more)
    common = (*DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    assert run_here(*common) == 0
    first = (here / "out.jsonl").read_bytes()
    capfd.readouterr()
    monkeypatch.setattr(build, "load", None)
    assert run_here(*common) == 0
    assert "nothing to do: all " in capfd.readouterr().out
    assert (here / "out.jsonl").read_bytes() == first


def test_a_shard_without_rows_has_nothing_to_do(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(here / "in.jsonl", sums(3, max_tokens=2))
    common = (*DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    assert run_here(*common, "shard=[1,2]") == 0  # one of three rows, where three halves would be rounded to two
    monkeypatch.setattr(build, "load", None)
    for shard in ("shard=[1,2]", "shard=[4,5]"):
        assert run_here(*common, shard) == 0
        assert "nothing to do" in capfd.readouterr().out
    assert (here / "out-00004-of-00005.jsonl").read_bytes() == b""


def test_a_run_in_which_no_row_could_be_answered_ends_with_2(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also when it is started again; with a single answer, of today's run or an earlier one, it is 0."""
    bad = [{"prompt": "1+1=", "temprature": 0}] * 3
    write_rows(here / "in.jsonl", bad)
    common = (*DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    for _ in range(2):
        assert run_here(*common) == 2
        told = ERROR.findall(capfd.readouterr().err)
        assert told == ["error: none of the 3 rows could be answered; row-0: unknown key 'temprature': did you mean "
                        "'temperature'?"]  # fmt: skip
        assert len(read_rows(here / "out.jsonl")) == 3
    write_rows(here / "in.jsonl", bad + sums(1, max_tokens=2))
    assert run_here(*common) == 0
    write_rows(here / "in.jsonl", [*bad, *sums(1, max_tokens=2), {"prompt": 5}])
    assert run_here(*common) == 0


def test_lines_that_no_model_could_answer_load_none(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A table of CSV, say; and a file of blank lines, which has no rows."""
    monkeypatch.setattr(build, "load", None)
    common = (*DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    (here / "in.jsonl").write_text("prompt,max_tokens\n1+1=,5\n")
    assert run_here(*common) == 2
    assert "error: none of the 2 rows could be answered; row-0: the line is not valid JSON" in capfd.readouterr().err
    assert [row["error"]["code"] for row in read_rows(here / "out.jsonl")] == ["invalid_json"] * 2
    (here / "in.jsonl").write_text("\n \n")
    assert run_here(*common) == 2
    assert capfd.readouterr().err == "error: input=in.jsonl has no rows, only blank lines\n"


def test_shards_answer_every_row_once_as_the_whole_does(here: Path) -> None:
    rows = [*sums(9), {"prompt": "1+2="}, {"custom_id": "sum-3", "prompt": "again"}]
    write_rows(here / "in.jsonl", rows)
    common = (*DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    assert run_here(*common) == 0
    shards = []
    for number in range(2):
        assert run_here(*common, f"shard=[{number},2]") == 0
        shards.append((here / f"out-0000{number}-of-00002.jsonl").read_text().splitlines())
        assert (here / f"out-0000{number}-of-00002.summary.json").exists()
    whole = (here / "out.jsonl").read_text().splitlines()
    assert (shards[0], shards[1]) == (whole[::2], whole[1::2])


def test_what_is_deleted_while_a_run_works_is_in_its_output(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, the answers of an earlier attempt, and the lock."""
    write_rows(here / "in.jsonl", sums(60))
    common = (*DEMO, "input=in.jsonl", "run_dir=run", "scheduler.max_num_seqs=4", *GREEDY)
    assert run_here(*common, "output=whole.jsonl") == 0
    cut(lambda: run_here(*common, "output=out.jsonl"), 20)
    write, written = PartWriter.write, here / "written"

    def deleting(self: PartWriter, *args: Any) -> None:  # in the process that writes
        write(self, *args)
        with open(written, "a") as file:
            file.write("x")
        if written.stat().st_size in (1, 20):
            shutil.rmtree(parts_of(here / "out.jsonl"), ignore_errors=True)

    monkeypatch.setattr(PartWriter, "write", deleting)
    assert run_here(*common, "output=out.jsonl") == 0
    assert written.stat().st_size == 40 and not parts_of(here / "out.jsonl").exists()
    assert (here / "out.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()


def test_a_full_disk_ends_the_run_with_one_line_and_the_next_goes_on(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(here / "in.jsonl", sums(600))
    with small_disk(here / "disk", 100) as disk:
        overrides = (*DEMO, "input=in.jsonl", "output=disk/out.jsonl", "run_dir=run", *GREEDY)
        done = run(torchrun(2, "topology=dp2", *overrides), here)
        assert done.returncode != 0
        [told] = ERROR.findall(done.stderr)
        assert re.search(
            r"disk/out.jsonl.parts/part-[01].jsonl can't be written: No space left on device \(0.0 of", told
        )
        assert "spmd/" not in done.stderr, "a traceback of ours"
        [safe] = re.findall(r"the ([\d,]+) answers that it got in this run are safe", told)
        kept = sum(len(part.read_text().splitlines()) - 1 for part in Paths.of(str(disk / "out.jsonl")).parts())
        assert int(safe) <= kept < 600
        enlarge(disk, 8000)
        assert run_here(*overrides) == 0
        assert f"resumed: {kept} more rows" in capfd.readouterr().out
        assert run_here(*overrides, "output=whole.jsonl") == 0
        assert (disk / "out.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_cut_off_leaves_whole_answers_and_no_processes(here: Path, sign: signal.Signals) -> None:
    """Torchrun is killed, which leaves its ranks alone; or it is told to stop, as Ctrl-C does."""
    write_rows(here / "in.jsonl", sums(30_000))
    overrides = ("topology=pp2", *DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    job = start(torchrun(2, *overrides), here)
    part = parts_of(here / "out.jsonl") / "part-0.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not part.exists() or part.stat().st_size < 20_000:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        children = ranks_of(job.pid)
        assert len(children) == 2
        os.kill(job.pid, sign)
        _, told = job.communicate(timeout=40)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    assert not any(map(alive, children))
    assert not (here / "out.jsonl").exists()
    assert told.count("KeyboardInterrupt") == 0
    lost = "torchrun on .*, which keeps the ranks' store, gave no sign of life for "
    assert len(re.findall(f"^error: {lost}", told, re.MULTILINE)) == (2 if sign == signal.SIGKILL else 0)
    whole = part.read_text().splitlines(keepends=True)[1:]
    assert len(whole) >= 20
    assert all(line.endswith("\n") and json.loads(line.split("\t")[3])["response"] for line in whole)


def test_a_rank_that_fails_ends_the_run_and_says_why(here: Path) -> None:
    """Rank 0 fails in mid-run, while the other waits for its hidden states."""
    write_rows(here / "in.jsonl", sums(50))
    (here / "failing.py").write_text(
        "from spmd.generate import cli\nfrom spmd.stage.stage import Stage\n"
        "run = Stage.run\n"
        "def failing(self, plan, *rest):\n"
        "    if plan.tick == 5 and self.forward.decoder.first: raise RuntimeError('out of memory, say')\n"
        "    return run(self, plan, *rest)\n"
        "Stage.run = failing\ncli()\n"
    )
    command = torchrun(2, "topology=pp2", *DEMO, "input=in.jsonl", "output=out.jsonl", "run_dir=run", *GREEDY)
    place = command.index("-m", 3)
    done = run([*command[:place], "failing.py", *command[place + 2 :]], here)
    assert done.returncode != 0
    told = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert len(told) == 1 and re.match(r"error: rank 0 \(.*\) failed: RuntimeError: out of memory, say$", told[0])
    assert "out of memory, say" in (here / "run" / "logs" / "rank-0.log").read_text()


def parts_of(output: Path) -> Path:
    return Paths.of(str(output)).folder


def ranks_of(pid: int) -> list[int]:
    """The children of a torchrun process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
