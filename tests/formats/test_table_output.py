"""A Parquet file of answers: their text, and what was carried with its own types; made once, and never half."""

import gzip
import json
import os
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from spmd.api.rows import BESIDE_PROMPT
from spmd.formats import table_output
from spmd.formats.column_values import from_json, to_json, type_behind
from spmd.formats.sources import find_sources
from spmd.formats.table_output import carried_schema, check_table, make_table
from spmd.formats.table_rows import Columns
from tests.support.attempts import small_disk
from tests.support.jobs import run_here
from tests.support.ranks import Ranks
from tests.test_generate import on_rank

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402

JOB = ("model=demo", "model.dtype=float32", "device=cpu", "sampling.temperature=0", "run_dir=run", "progress=false")
COLUMNS = Columns(None, BESIDE_PROMPT)
Said = pytest.CaptureFixture[str]
TABLE = Path("out.parquet")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(name: str, text: str | None, metadata: Any = None) -> dict[str, Any]:
    """A line of an output, of a chat row; `text`: None for an error."""
    error = None if text is not None else {"code": "invalid_request", "message": "no"}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"error": error} if error else {"choices": [choice]}
    line = {"id": "x", "custom_id": name, "response": {"status_code": 200, "body": body}, "error": error}
    return line if metadata is None else line | {"metadata": metadata}


def make(lines: list[dict[str, Any]], carried: Any = None) -> list[dict[str, Any]]:
    Path("answers").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("keys").write_text("header\n" + "".join(f"{hash(str(line))}\n" for line in lines))
    make_table(Path("answers"), Path("keys"), TABLE, carried)
    rows: list[dict[str, Any]] = parquet.read_table(TABLE).to_pylist()
    return rows


def test_a_row_for_each_answer_with_its_text_or_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_output, "ROWS", 2)
    rows = make([answer("a", "é☃", {"id": 1}), answer("b", None), answer("c", "x"), answer("d", "", [1])])
    assert [(row["custom_id"], row["text"], row["finish_reason"], row["error"], row["metadata"]) for row in rows] == [
        ("a", "é☃", "stop", None, '{"id": 1}'),
        ("b", None, None, "no", None),
        ("c", "x", "stop", None, None),
        ("d", "", "stop", None, "[1]"),
    ]
    assert json.loads(rows[0]["response"])["choices"][0]["message"]["content"] == "é☃"
    assert json.loads(rows[1]["response"])["error"]["message"] == "no"
    assert parquet.ParquetFile(TABLE).num_row_groups == 2


def test_metadata_that_is_no_text_stays_escaped_and_costs_no_table() -> None:
    rows = make([answer("a", None, {"x": "\ud800"}), answer("b", "x", "é")])
    assert [row["metadata"] for row in rows] == ['{"x": "\\ud800"}', '"é"']


VALUES: dict[str, Any] = {
    "day": pa.array([date(2024, 2, 29), None]),
    "seconds": pa.array([datetime(2024, 2, 29, 12, 1), None], pa.timestamp("s")),
    "zoned": pa.array([datetime(2024, 2, 29, 12, 1, 2, 3, tzinfo=UTC), None], pa.timestamp("us", "Europe/Berlin")),
    "nanoseconds": pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns")),
    "price": pa.array([Decimal("-1.50"), None]),
    "bytes": pa.array([b"\xff\0", None]),
    "fixed": pa.array([b"abcd", None], pa.binary(4)),
    "uint64": pa.array([2**64 - 1, None], pa.uint64()),
    "int8": pa.array([-7, None], pa.int8()),
    "float32": pa.array([0.1, None], pa.float32()),
    "large": pa.array([1e300, None]),
    "flag": pa.array([True, None]),
    "text": pa.array(["\u2028 é", None], pa.large_string()),
    "lists": pa.array([[[1], None], None]),
    "structs": pa.array([{"a": [{"b": "x", "c": None}]}, None]),
    "nothing": pa.nulls(2),
}


@pytest.mark.parametrize("column", VALUES.values(), ids=VALUES.keys())
def test_values_come_back_with_their_types(column: Any) -> None:
    values = json.loads(json.dumps(to_json(column), allow_nan=False))
    assert from_json(values, type_behind(column.type)).equals(column)


def test_values_that_json_cannot_say_come_back_as_text() -> None:
    words = pa.array(["x", None]).dictionary_encode()
    assert from_json(to_json(words), type_behind(words.type)).to_pylist() == ["x", None]
    times = pa.array([time(1, 2, 3), None])
    assert from_json(to_json(times), type_behind(times.type)).to_pylist() == ["01:02:03", None]
    pairs = pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64()))
    assert from_json(to_json(pairs), type_behind(pairs.type)).to_pylist() == ['[["k", 1]]', None]


def test_columns_of_several_tables_are_put_together_or_the_difference_is_told() -> None:
    parquet.write_table(pa.table({"prompt": ["a"], "n": [1], "id": pa.array([1], pa.int32())}), "a")
    parquet.write_table(pa.table({"prompt": ["a"], "id": [1], "more": ["x"]}), "b")
    schema: Any = carried_schema(find_sources(["a", "b"]), COLUMNS)
    assert [(field.name, str(field.type)) for field in schema] == [("id", "int64"), ("more", "string")]
    parquet.write_table(pa.table({"prompt": ["a"], "id": ["x"]}), "b")
    with pytest.raises(ValueError, match="the tables of the input don't go together: "):
        carried_schema(find_sources(["a", "b"]), COLUMNS)
    Path("c.jsonl").write_text("{}\n")
    assert carried_schema(find_sources(["a", "c.jsonl"]), COLUMNS) is None


def test_columns_with_the_names_of_ours_get_a_line_behind_them() -> None:
    carried = pa.schema([("text", pa.string()), ("text_", pa.int64()), ("error", pa.string())])
    (row,) = make([answer("a", "ours", {"text": "theirs", "text_": 1, "error": "e"})], carried)
    assert (row["text"], row["text__"], row["text_"], row["error_"]) == ("ours", "theirs", 1, "e")


def test_it_is_made_again_where_answers_have_changed_and_else_left_alone() -> None:
    make([answer("a", "x")])
    made = TABLE.stat().st_mtime_ns
    make([answer("a", "x")])
    assert TABLE.stat().st_mtime_ns == made
    assert make([answer("a", "y")])[0]["text"] == "y"


def test_a_full_disk_leaves_the_old_one_and_says_where_the_answers_are(folder: Path) -> None:
    Path("keys").write_text("header\n")
    Path("answers").write_text("".join(json.dumps(answer(f"{n}", os.urandom(500).hex())) + "\n" for n in range(200)))
    with small_disk(folder / "disk", kib=64) as disk:
        (disk / "out.parquet").write_bytes(b"old")
        with pytest.raises(
            ValueError, match=r"No space left .*; all answers are in answers: mend that, then start again"
        ):
            make_table(Path("answers"), Path("keys"), disk / "out.parquet", None)
        assert [path.read_bytes() for path in disk.iterdir()] == [b"old"]


def test_a_file_of_somebody_else_is_not_replaced() -> None:
    for content in (b"", b"PAR1" + bytes(50)):
        TABLE.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"output=out\.parquet exists and was made by no run: choose another output"
        ):
            check_table("out.parquet", [], None)
    parquet.write_table(pa.table({"prompt": ["a"]}), TABLE)
    with pytest.raises(ValueError, match="was made by no run"):
        check_table("out.parquet", [], None)
    check_table("out.parquet", [], None, fresh=True)
    with pytest.raises(ValueError, match=r"output=out\.parquet is the input"):
        check_table("out.parquet", ["./out.parquet"], None)
    with pytest.raises(ValueError, match=r"errors=./out\.parquet is the output"):
        check_table("out.parquet", [], "./out.parquet")
    make([answer("a", "x")])
    with pytest.raises(ValueError, match=r"is there, but out\.parquet\.jsonl is not, which holds its answers"):
        check_table("out.parquet", [], None)


# -- runs -------------------------------------------------------------------------------------------------------------


def rows() -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in parquet.read_table(TABLE, columns=["custom_id", "text"]).to_pylist()]


def test_two_ranks_go_from_a_compressed_file_to_a_table(ranks: Ranks) -> None:
    lines = [{"custom_id": f"{n}", "prompt": f"{n}+{n}=", "max_tokens": 8, "metadata": {"n": n}} for n in range(9)]
    Path("in.gz").write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    job = (*JOB, "topology=pp2", f"input={Path('in.gz').resolve()}", f"output={TABLE.resolve()}")
    told = ranks.run(2, on_rank, *job[:4], f"run_dir={Path('run').resolve()}", *job[5:])
    assert [status for status, _ in told] == [0, 0], told
    assert f"answers: {TABLE.resolve()}\n" in told[0][1]
    assert rows() == [(f"{n}", f"{2 * n}") for n in range(9)]
    assert parquet.read_table(TABLE)["metadata"].to_pylist() == [f'{{"n": {n}}}' for n in range(9)]
    left = sorted(path.name for path in Path().iterdir())
    assert left == ["in.gz", "out.parquet", "out.parquet.jsonl", "out.parquet.jsonl.journal", "out.summary.json", "run"]


def test_a_table_in_and_out_that_was_cut_while_it_was_made_and_has_nothing_to_do_then(
    monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    days = [date(2024, 1, n + 1) for n in range(3)]
    parquet.write_table(
        pa.table({"prompt": ["1+1=", "2+2=", "oh"], "max_tokens": [8, 8, 0], "day": days}), "in.parquet"
    )
    job = (*JOB, "input=in.parquet", "output=out.parquet")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr("spmd.run_files.make_table", killed)
        run_here(*job)
    assert not TABLE.exists()
    Path("out.parquet.new").write_bytes(b"half")
    capsys.readouterr()
    for _ in range(2):
        assert run_here(*job) == 0
        assert "nothing to do: all 3 rows were done by earlier runs" in capsys.readouterr().out
        assert rows() == [("row-0", "2"), ("row-1", "4"), ("row-2", None)]
        assert parquet.read_table(TABLE)["day"].to_pylist() == days
        assert not Path("out.parquet.new").exists() and not Path("out.parquet.jsonl.parts").exists()
