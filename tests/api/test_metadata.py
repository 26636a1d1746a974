"""What a row carries comes back in its answer whatever it is, in error lines too, and fails no row."""

import json
from pathlib import Path
from typing import Any

import pytest

from spmd.api.answers import Head, answer_line, error_line
from spmd.api.choices import Completion
from spmd.api.reader import Reader
from spmd.api.rows import BadRow, RowParser
from spmd.config import SamplingConfig
from spmd.processes.packed import pack, unpack

PARSER = RowParser(None, {}, SamplingConfig(), 64, 1000, 269)
SHORT = {"prompt": [5, 6], "custom_id": "a"}
BATCH = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": [5], "metadata": {"of": "the body"}}}


def line_of(text: str) -> str:
    """The line that answers a row, however it ends."""
    row = unpack(pack(PARSER.parse(text.encode("utf-8", "surrogatepass"), 0)))
    if isinstance(row, BadRow):
        return error_line(row)
    return answer_line(Head.of(row), [Completion("x", [5], "length")], "tiny", None)


@pytest.mark.parametrize("row", [SHORT, BATCH, SHORT | {"temprature": 1}, SHORT | {"custom_id": 1}])
@pytest.mark.parametrize("metadata", [{"source": "web", "id": 2**60}, "é\u2028☃", [1, None], 0, {}, False, 1.5])
def test_it_comes_back_as_it_was(row: dict[str, Any], metadata: Any) -> None:
    line = line_of(json.dumps(row | {"metadata": metadata}))
    assert json.loads(line)["metadata"] == metadata and "\u2028" not in line
    assert list(json.loads(line)) == ["id", "custom_id", "response", "error", "metadata"]


@pytest.mark.parametrize("row", [SHORT, BATCH, SHORT | {"metadata": None}])
def test_an_answer_without_it_is_as_it_always_was(row: dict[str, Any]) -> None:
    assert list(json.loads(line_of(json.dumps(row)))) == ["id", "custom_id", "response", "error"]


def test_what_is_no_json_becomes_null_and_half_a_pair_stays_an_escape() -> None:
    assert '"metadata": {"a": null, "b": [null]}' in line_of(
        '{"prompt": [5], "metadata": {"a": NaN, "b": [-Infinity]}}'
    )
    line = line_of('{"prompt": [5], "metadata": "\\ud800"}')
    assert line.endswith('"metadata": "\\ud800"}') and "half of a surrogate pair" in line


def test_however_deep_it_is_its_row_has_an_answer() -> None:
    for depth in range(100, 3000, 100):
        line = json.loads(line_of('{"prompt": [5], "metadata": ' + "[" * depth + "]" * depth + "}"))
        assert line["custom_id"] == "row-0"


def test_a_duplicate_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(SHORT | {"metadata": number}) + "\n" for number in range(2)))
    first, second = (found.row for found in Reader(str(path), None).read())
    assert not isinstance(first, BadRow) and isinstance(second, BadRow) and second.metadata == "1"
