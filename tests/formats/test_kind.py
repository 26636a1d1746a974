"""Files that are no input are told by what they are, before any weight is loaded; a bad first row is only a bad row."""

import gzip
import json
from pathlib import Path

import pytest

from spmd.formats.content import blocks_of, is_plain
from spmd.formats.sources import find_sources
from spmd.formats.table_rows import Columns

ROW = {"prompt": "1+1=", "max_tokens": 2}
LINE = json.dumps(ROW)
ROWS = f"{LINE}\n{LINE}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(40), r"is a zip archive: unzip -p .*in\.jsonl \| launch/local\.sh input=-"),
        (
            b"SQLite format 3\0" + bytes(40),
            "is SQLite; the input is JSON, one object a line or an array of objects, or a table",
        ),
        (json.dumps(ROW, indent=2).encode(), "has JSON over several lines: jq -c"),
    ],
)
def test_a_file_of_a_kind_that_is_not_read_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        is_plain(*find_sources(str(path)))
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        list(blocks_of(find_sources(str(path))[0], Columns(None, {})))


@pytest.mark.parametrize(
    "first",
    ["[1]", "{", '{"prompt": ', "[]", "null", "{}", "", "\ufeff"],
    ids=["list", "brace", "torn", "empty list", "null", "empty object", "blank", "mark"],
)
def test_a_bad_first_row_costs_no_other(tmp_path: Path, first: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"{first}\n{ROWS}", encoding="utf-8")
    assert is_plain(*find_sources(str(path)))


def test_one_row_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    for content in (LINE, f"\n\n{LINE}", "x", '["not rows"]'):
        path.write_text(content)
        assert is_plain(*find_sources(str(path)))
