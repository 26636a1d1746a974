"""Files that are no input are told by what they are, before any weight is loaded; a bad first row is only a bad row."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from spmd.api.reader import Reader, check_input

ROW = {"prompt": "1+1=", "max_tokens": 2}
LINE = json.dumps(ROW)
ROWS = f"{LINE}\n{LINE}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(ROWS.encode()), r"is compressed \(gzip\): zcat .*in\.jsonl > in\.jsonl makes an input of it"),
        (b"\x28\xb5\x2f\xfd" + bytes(40), r"is compressed \(Zstandard\)"),
        (bz2.compress(ROWS.encode()), r"is compressed \(bzip2\)"),
        (lzma.compress(ROWS.encode()), r"is compressed \(xz\)"),
        (b"PK\x03\x04" + bytes(40), r"is compressed \(a zip archive\)"),
        (b"PAR1" + bytes(40), "is Parquet; the input is a file of one JSON object a line"),
        (ROWS.encode("utf-16"), "is UTF-16: iconv"),
        (ROWS.encode("utf-16-le"), "is UTF-16: iconv"),
        (ROWS.encode("utf-16-be"), "is UTF-16: iconv"),
        (json.dumps([ROW, ROW]).encode(), "is a JSON array: jq"),
        (json.dumps([ROW, ROW], indent=1).encode(), "is a JSON array: jq"),
        (f"[\n{LINE}\n]".encode(), "is a JSON array: jq"),
        (f"[{LINE},\n{LINE}]\n".encode(), "is a JSON array: jq"),
        (b"\xef\xbb\xbf[\n", "is a JSON array: jq"),
        (json.dumps(ROW, indent=2).encode(), "has JSON over several lines: jq -c"),
    ],
)
def test_a_file_of_another_kind_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_input(str(path))


def test_what_is_no_file_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe: every rank reads the input, so write it to a file first"):
        check_input(str(tmp_path / "pipe"))
    with pytest.raises(ValueError, match="is a terminal or device"):
        check_input("/dev/null")
    reader, writer = os.pipe()
    with pytest.raises(ValueError, match="is a pipe"):
        check_input(f"/dev/fd/{reader}")
    for end in (reader, writer):
        os.close(end)


@pytest.mark.parametrize(
    "first",
    ["[1]", "{", '{"prompt": ', "[]", "null", "{}", "", "\ufeff"],
    ids=["list", "brace", "torn", "empty list", "null", "empty object", "blank", "mark"],
)
def test_a_bad_first_row_costs_no_other(tmp_path: Path, first: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"{first}\n{ROWS}", encoding="utf-8")
    Reader(str(path), None)


def test_one_row_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    for content in (LINE, f"\n\n{LINE}", "x", '["not rows"]'):
        path.write_text(content)
        assert check_input(str(path)) == len(content)
