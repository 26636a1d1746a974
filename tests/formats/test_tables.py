"""Tables become rows: the prompt by its column's name or type, keys by theirs, and all else is carried along."""

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from spmd.api.rows import BESIDE_PROMPT
from spmd.formats import tables
from spmd.formats.content import blocks_of, is_plain, roles_in
from spmd.formats.sources import find_sources
from spmd.formats.table_rows import Columns

pa = pytest.importorskip("pyarrow")
import pyarrow.feather as feather  # noqa: E402
import pyarrow.parquet as parquet  # noqa: E402

CHAT = [[{"role": "user", "content": f"{n}"}, {"role": "tool", "content": None, "name": "x"}] for n in range(3)]


def rows(given: Any, column: str | None = None) -> list[dict[str, Any]]:
    columns = Columns(column, BESIDE_PROMPT)
    roles_in(find_sources(given), columns)
    text = b"".join(block for source in find_sources(given) for block in blocks_of(source, columns))
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(columns: dict[str, Any], path: str = "in.parquet") -> str:
    parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


def as_stream(table: Any, path: str) -> None:
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Any, str], None]] = {
    "parquet": lambda table, path: parquet.write_table(table, path, row_group_size=700),
    "feather": lambda table, path: feather.write_feather(table, path),
    "arrow file": lambda table, path: feather.write_feather(table, path, compression="uncompressed", chunksize=1500),
    "arrow stream": as_stream,
}


@pytest.mark.parametrize("write_as", WRITERS.values(), ids=WRITERS.keys())
def test_every_kind_of_table_gives_all_its_rows_in_order(write_as: Callable[[Any, str], None]) -> None:
    write_as(pa.table({"prompt": [f"é {n}" for n in range(2500)], "id": range(2500)}), "in")
    assert rows("in") == [{"prompt": f"é {n}", "metadata": {"id": n}} for n in range(2500)]
    assert not is_plain(*find_sources("in"))


def test_messages_keys_and_ids_stand_in_the_row_and_the_rest_is_carried() -> None:
    path = write(
        {
            "messages": CHAT,
            "custom_id": [7, None, 9],
            "temperature": [0.5, None, float("nan")],
            "max_tokens": [16.0, float("nan"), 3],
            "chat_template_kwargs": [{"a": 1, "b": None}, {"a": None, "b": "x"}, None],
            "text": ["x", None, "z"],
            "label": [1, 2, 3],
        }
    )
    first, second, third = rows(path)
    assert first == {
        "messages": [{"role": "user", "content": "0"}, {"role": "tool", "name": "x"}],
        "custom_id": "7",
        "temperature": 0.5,
        "max_tokens": 16.0,
        "chat_template_kwargs": {"a": 1},
        "metadata": {"text": "x", "label": 1},
    }
    assert second.keys() == {"messages", "chat_template_kwargs", "metadata"}
    assert second["metadata"] == {"text": None, "label": 2}
    assert third.keys() == {"messages", "custom_id", "max_tokens", "metadata"}
    (roles,) = roles_in(find_sources(path), Columns(None, BESIDE_PROMPT))
    assert str(roles) == (
        "messages from column messages; keys of rows are custom_id, temperature, max_tokens, chat_template_kwargs; "
        "carried through are text, label"
    )


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (["a", "b"], "prompt"),
        ([[1, 2], [3]], "prompt"),
        ([["a"], ["b", "c"]], "prompt"),
        ([CHAT[0][:1], CHAT[1][:1]], "messages"),
        ([{"prompt": "a", "n": 2}, {"prompt": "b", "n": 1}], "body"),
    ],
)
def test_a_column_that_is_named_is_taken_by_its_type(values: list[Any], key: str) -> None:
    assert rows(write({"q": values, "prompt": ["x", "y"]}), "q") == [
        {key: value, "metadata": {"prompt": other}} for value, other in zip(values, ["x", "y"], strict=True)
    ]


def test_bodies_and_messages_may_be_json_and_what_is_none_fails_its_own_row() -> None:
    body = {"messages": CHAT[0], "max_tokens": 5}
    found = rows(write({"body": [json.dumps(body), "oh"], "url": ["/v1/chat/completions", None]}))
    assert found == [{"body": body, "url": "/v1/chat/completions"}, {"body": "oh"}]
    assert rows(write({"messages": [json.dumps(CHAT[0])]})) == [{"messages": CHAT[0]}]


def test_any_type_can_be_carried() -> None:
    (row,) = rows(
        write(
            {
                "prompt": ["a"],
                "day": [date(2024, 2, 29)],
                "time": [datetime(2024, 2, 29, 12, tzinfo=UTC)],
                "price": [Decimal("1.50")],
                "bytes": [b"\xff\0"],
                "image": [{"bytes": b"\xff", "path": None}],
                "nan": [float("nan")],
                "kind": pa.array(["x"]).dictionary_encode(),
                "deep": [[{"a": [1.5, None]}]],
            }
        )
    )
    assert row["metadata"] | {"nan": 0} == {
        "day": "2024-02-29",
        "time": "2024-02-29 12:00:00.000000Z",
        "price": "1.50",
        "bytes": "/wA=",
        "image": '{"bytes": "/w==", "path": null}',
        "nan": 0,
        "kind": "x",
        "deep": [{"a": [1.5, None]}],
    }


@pytest.mark.parametrize(
    ("names", "column", "message"),
    [
        (
            ["text", "n"],
            None,
            "has no column messages, prompt, body: input_column=NAME says which holds the prompts; its",
        ),
        (["prompt", "messages"], None, "has columns messages and prompt: input_column=NAME says which"),
        (["text"], "question", "has no column input_column=question; its columns are text"),
    ],
)
def test_a_table_whose_prompts_are_not_found_is_told(names: list[str], column: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(write({name: ["a"] for name in names}), column)


def test_a_column_that_holds_no_prompts_is_told() -> None:
    for values, kind in (([b"a"], "binary"), ([1], "int64"), ([None], "null")):
        with pytest.raises(ValueError, match=rf"in\.parquet: column prompt is {kind}, not text, token ids, messages"):
            rows(write({"prompt": values}))


def test_a_column_is_for_tables_alone() -> None:
    Path("in.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"input_column=q is for tables, and input=in\.jsonl is none"):
        rows("in.jsonl", "q")


def test_a_table_that_is_cut_off_is_told() -> None:
    for name, write_as in WRITERS.items():
        write_as(pa.table({"prompt": [f"{n}" * 100 for n in range(2500)]}), name)
        content = Path(name).read_bytes()
        for cut in (len(content) // 2, len(content) - 20):
            Path(name).write_bytes(content[:cut])
            with pytest.raises(ValueError, match=f"input={name} can't be read: "):
                rows(name)


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    write({"prompt": ["a"]})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(
        ValueError, match=r"in\.parquet is a table, which the package pyarrow handles: .* -m pip install pyarrow"
    ):
        rows("in.parquet")


def saved(folder: Path, *texts: str) -> None:
    folder.mkdir(parents=True)
    files = [f"data-{n:05}-of-{len(texts):05}.arrow" for n in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        as_stream(pa.table({"prompt": [text]}), str(folder / file))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))


def test_a_saved_dataset_is_its_shards_and_of_splits_one_is_chosen() -> None:
    saved(Path("all/train"), "a", "b")
    saved(Path("all/test"), "c")
    Path("all/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert rows("all/train") == [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(ValueError, match="several splits: choose input=all/train or input=all/test"):
        find_sources("all")
    Path("all/test/state.json").write_text("[]")
    with pytest.raises(ValueError, match="input=all/test is no dataset as save_to_disk leaves it"):
        find_sources("all/test")


def test_a_dataset_of_the_hub_is_its_parquet_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **how: Any) -> str:
        asked.append((name, *how.values()))
        return str(folder / "hub")

    monkeypatch.setattr("spmd.formats.saved_dataset.snapshot_download", download)
    for number in range(2):
        Path("hub/main/train").mkdir(parents=True, exist_ok=True)
        write({"prompt": [f"{number}"]}, f"hub/main/train/000{number}.parquet")
    assert rows("hf://datasets/me/sums?split=train") == [{"prompt": "0"}, {"prompt": "1"}]
    assert asked[0] == ("me/sums", "dataset", "refs/convert/parquet", "*/train/*.parquet")
    with pytest.raises(ValueError, match="has no rows in the Hub's Parquet copy of split test, config main"):
        find_sources("hf://datasets/me/sums?split=test&config=main")
    Path("hub/other/train").mkdir(parents=True)
    write({"prompt": ["x"]}, "hub/other/train/0000.parquet")
    with pytest.raises(ValueError, match="several configs: choose one by config=, of main, other"):
        find_sources("hf://datasets/me/sums")


def test_where_the_hub_is_out_of_reach_or_the_address_is_none_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise RuntimeError("offline\nmore")

    monkeypatch.setattr("spmd.formats.saved_dataset.snapshot_download", download)
    with pytest.raises(ValueError, match=r"hf://datasets/a/b can't be had: offline; where the Hub is out of reach"):
        find_sources("hf://datasets/a/b")
    for url in ("hf://models/a/b", "hf://datasets/", "hf://datasets/a/b?splits=x", "hf://datasets/a/b/c/d"):
        with pytest.raises(ValueError, match="is no address of a dataset: hf://datasets/OWNER/NAME"):
            find_sources(url)


def test_no_more_than_some_rows_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 10)
    for name, write_as in WRITERS.items():
        write_as(pa.table({"prompt": [f"{n}" for n in range(95)]}), name)
        blocks = [*blocks_of(find_sources(name)[0], Columns(None, BESIDE_PROMPT))]
        assert max(block.count(b"\n") for block in blocks) == 10 and sum(block.count(b"\n") for block in blocks) == 95
