"""Runs whose input isn't one plain file: the answers are those of the plain one, and nothing is left beside them."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import ONE_THREAD, ROOT, bodies, read_rows, run_here, write_rows

JOB = ("model=demo", "model.dtype=float32", "device=cpu", "sampling.temperature=0", "run_dir=run", "progress=false")
OUT = Path("out.jsonl")
Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sums(*numbers: int) -> list[dict[str, Any]]:
    """Rows the demo model answers."""
    return [{"custom_id": f"{number}", "prompt": f"{number}+{number}=", "max_tokens": 8} for number in numbers]


def lines(*numbers: int) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in sums(*numbers)).encode()


def texts(output: str) -> dict[str, str]:
    return {name: body["choices"][0]["text"] for name, body in bodies(Path(output)).items()}


def test_compressed_files_are_answered_as_the_plain_one_and_go_on_from_it(folder: Path, capsys: Said) -> None:
    write_rows(folder / "all.jsonl", sums(1, 2, 3, 4))
    assert run_here(*JOB, "input=all.jsonl", "output=plain.jsonl") == 0
    Path("x-1.jsonl.gz").write_bytes(gzip.compress(lines(1, 2)))
    Path("x-2.jsonl").write_text(json.dumps(sums(3), indent=1), encoding="utf-16")
    assert run_here(*JOB, "input=x-*", "output=out.jsonl") == 0
    assert "input: 2 files, kept as lines in " in capsys.readouterr().out
    assert texts("out.jsonl") == {"1": "2", "2": "4", "3": "6"}
    assert not Path("out.jsonl.parts").exists()
    Path("x-3.jsonl").write_bytes(lines(4))
    assert run_here(*JOB, "input=[x-1.jsonl.gz,x-2.jsonl,x-3.jsonl]", "output=out.jsonl") == 0
    assert "resumed: 3 more rows were done by earlier runs" in capsys.readouterr().out
    assert Path("out.jsonl").read_bytes() == Path("plain.jsonl").read_bytes()
    assert run_here(*JOB, "input=x-*", "output=out.jsonl") == 0
    assert "nothing to do: all 4 rows" in capsys.readouterr().out
    assert not Path("out.jsonl.parts").exists()


def test_a_broken_shard_is_told_before_weights_load_and_costs_no_answer(folder: Path, capsys: Said) -> None:
    Path("a.jsonl.gz").write_bytes(gzip.compress(lines(1, 2)))
    Path("b.jsonl.gz").write_bytes(gzip.compress(lines(3))[:-9])
    assert run_here(*JOB, "input=a.jsonl.gz", "output=out.jsonl") == 0
    assert run_here(*JOB, "input=*.gz", "output=out.jsonl") == 2
    assert "error: input=b.jsonl.gz can't be read: Compressed file ended before" in capsys.readouterr().err
    Path("b.jsonl.gz").write_bytes(gzip.compress(lines(3)))
    assert run_here(*JOB, "input=*.gz", "output=out.jsonl") == 0
    assert "resumed: 2 more rows" in capsys.readouterr().out
    assert texts("out.jsonl") == {"1": "2", "2": "4", "3": "6"}


def test_the_output_may_be_none_of_the_inputs(folder: Path, capsys: Said) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_bytes(lines(1))
    assert run_here(*JOB, "input=[a.jsonl,b.jsonl]", "output=b.jsonl") == 2
    assert "output=b.jsonl is the input: it would be overwritten" in capsys.readouterr().err
    assert run_here(*JOB, "input=[a.jsonl,b.jsonl]", "output=out.jsonl", "errors=b.jsonl") == 2
    assert "errors=b.jsonl is the input" in capsys.readouterr().err


def test_a_table_is_answered_with_what_it_carries(folder: Path, capsys: Said) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"question": ["1+1=", "2+2=", None], "max_tokens": [8, 0, 8], "id": [7, 8, 9]}
    parquet.write_table(pa.table(columns), "in.parquet")
    assert run_here(*JOB, "input=in.parquet", "output=out.jsonl") == 2
    assert "has no column messages, prompt, body: input_column=NAME says which" in capsys.readouterr().err
    assert run_here(*JOB, "input=in.parquet", "output=out.jsonl", "input_column=question") == 0
    said = capsys.readouterr().out
    assert "prompt from column question; keys of rows are max_tokens; carried through are id\n" in said
    found = [(row["custom_id"], row["metadata"], row["error"] and row["error"]["message"]) for row in read_rows(OUT)]
    assert found[0] == ("row-0", {"id": 7}, None) and found[1] == (
        "row-1",
        {"id": 8},
        "max_tokens=0 must be at least 1",
    )
    assert found[2][1] == {"id": 9} and "neither prompt nor messages" in found[2][2]


def test_what_a_shell_opens_reaches_the_ranks_through_the_launcher(folder: Path) -> None:
    Path("in.gz").write_bytes(gzip.compress(lines(5, 6)))
    words = " ".join(JOB)
    command = f"{ROOT}/launch/local.sh {words} topology=pp2 input=<(zcat in.gz) output=out.jsonl"
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | ONE_THREAD | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert texts("out.jsonl") == {"5": "10", "6": "12"}
    assert len(read_rows(Path("out.jsonl"))) == 2
