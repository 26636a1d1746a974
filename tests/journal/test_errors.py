"""A file of errors beside the output, and outputs whose lines an older version wrote."""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from spmd.integers import digest64
from spmd.journal.format import one_line
from spmd.journal.journal import Journal
from spmd.journal.key_table import KeyTable
from spmd.journal.writer import PartWriter
from tests.support.attempts import HEADER, names, small_disk

OLD_ERROR = (
    '{"id": "batch_req_1", "custom_id": "a", "response": null, "error": {"code": "invalid_request", "message": "x"}}'
)


def attempt(
    output: Path,
    rows: Sequence[int],
    failing: Collection[int] = (),
    errors: Path | None = None,
    resume: str = "auto",
    cut: int | None = None,
    lines: dict[int, str] | None = None,
    keyless: Collection[int] = (),
) -> int:
    """One run over rows with these keys; `lines`: their answers. How many it answered."""
    with Journal(
        str(output), ["in.jsonl"], HEADER, resume, patience=0, errors=str(errors) if errors else None
    ) as journal:
        done = KeyTable(journal.known)
        to_do = [(row, key) for row, key in enumerate(rows) if not done.set(key, row) or key in keyless]
        with PartWriter(str(output), 0, journal.header) as part:
            for row, key in to_do[:cut]:
                line = (lines or {}).get(key, json.dumps({"row": key, "failed": key in failing}))
                part.write(row, line, None if key in keyless else key, key in failing or key in keyless)
            part.close()
        if cut is None:
            journal.finish(1, done, len(to_do))
    return len(to_do[:cut])


def keys(path: Path) -> list[int]:
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def errors(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "er" / "errors.jsonl"


def test_errors_stand_in_a_file_of_their_own_too(output: Path, errors: Path) -> None:
    attempt(output, range(9), failing=[2, 5, 7], errors=errors)
    assert keys(output) == list(range(9)) and keys(errors) == [2, 5, 7]
    lines = output.read_text().splitlines()
    assert errors.read_text().splitlines() == [lines[2], lines[5], lines[7]]
    assert names(errors.parent) == ["errors.jsonl"]


def test_the_file_of_errors_tells_of_the_whole_output_however_it_came_about(output: Path, errors: Path) -> None:
    attempt(output, range(9), failing=[2, 5, 7], cut=4)
    attempt(output, range(9), failing=[2, 5, 7], cut=2, errors=errors)
    assert not errors.exists()  # as long as the output isn't complete
    attempt(output, range(9), failing=[2, 5, 7], errors=errors)
    assert keys(errors) == [2, 5, 7]
    errors.unlink()
    assert attempt(output, range(9), errors=errors) == 0 and keys(errors) == [2, 5, 7]  # nothing to do
    assert attempt(output, [*range(3), 20], failing=[20], errors=errors) == 1 and keys(errors) == [2, 20]
    assert attempt(output, range(9), failing=[5], resume="retry_errors", errors=errors) == 3 and keys(errors) == [5]
    assert attempt(output, range(9), resume="retry_errors", errors=errors) == 1
    assert errors.read_bytes() == b""


def test_rows_without_a_key_are_errors_too(output: Path, errors: Path) -> None:
    attempt(output, range(4), keyless=[3], errors=errors)
    assert keys(errors) == [3]
    attempt(output, range(4), keyless=[3], errors=errors)
    assert keys(errors) == [3]


def test_a_file_of_errors_that_cannot_be_is_refused_before_the_run(output: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path, "is a directory"),
        (Path("/dev/null"), "no regular file"),
        (output, "is the output or belongs to it"),
        (tmp_path / "out.jsonl.journal", "is the output or belongs to it"),
        (tmp_path / "out.jsonl.parts" / "x", "is the output or belongs to it"),
        (tmp_path / "file" / "x", "errors=.*can't be written: "),
        (Path("in.jsonl"), "is the input"),
    ):
        with pytest.raises(ValueError, match=words):
            attempt(output, range(3), errors=path)
    assert names(tmp_path) == ["file"]


def test_a_full_disk_of_errors_leaves_a_complete_output_and_the_file_as_it_was(output: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 16) as disk:
        errors = disk / "errors.jsonl"
        errors.write_text("before\n")
        lines = {key: json.dumps({"row": key, "text": os.urandom(3000).hex()}) for key in range(9)}
        with pytest.raises(ValueError, match=r"errors=.*can't be written: No space left.*the output is complete"):
            attempt(output, range(9), failing=range(9), errors=errors, lines=lines)
        assert names(disk) == ["errors.jsonl"] and errors.read_text() == "before\n"
        assert keys(output) == list(range(9))
    elsewhere = tmp_path / "errors.jsonl"
    assert attempt(output, range(9), errors=elsewhere) == 0 and keys(elsewhere) == list(range(9))


# -- lines of an older version ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [2, None])
def test_an_output_with_error_rows_of_the_version_before_is_gone_on_with(
    output: Path, errors: Path, cut: int | None
) -> None:
    attempt(output, range(3), failing=[1], lines={1: OLD_ERROR}, cut=cut)
    assert attempt(output, range(5), errors=errors) == (3 if cut else 2)
    assert output.read_text().splitlines()[1] == OLD_ERROR and errors.read_text() == OLD_ERROR + "\n"
    assert attempt(output, range(5), errors=errors) == 0
    assert attempt(output, range(5), resume="retry_errors", errors=errors) == 1
    assert keys(output) == list(range(5)) and errors.read_bytes() == b""


@pytest.mark.parametrize("cut", [2, None])
def test_separators_that_the_version_before_wrote_raw_are_escaped_when_an_output_is_written_again(
    output: Path, cut: int | None
) -> None:
    texts = ["a\u2028b", "\u2029", "é\u0085日"]
    lines = {key: json.dumps({"row": key, "text": texts[key]}, ensure_ascii=False) for key in range(3)}
    attempt(output, range(3), lines=lines, cut=cut)
    if cut is None:  # as it was: raw, with digests of raw lines beside it
        journal = output.with_name("out.jsonl.journal")
        header = journal.read_bytes().split(b"\n")[0]
        output.write_text("".join(lines[key] + "\n" for key in range(3)))
        digests = [b"%016x\t%016x\n" % (key, digest64(lines[key].encode())) for key in range(3)]
        journal.write_bytes(header + b"\n" + b"".join(digests))
    assert attempt(output, range(4), lines=lines) == (2 if cut else 1)
    assert len(output.read_text().splitlines()) == 4
    assert [json.loads(line).get("text") for line in output.read_text().splitlines()] == [*texts, None]
    assert attempt(output, range(4)) == 0
    attempt(output, [0])  # the others are put aside, and come back
    assert attempt(output, range(4)) == 0 and len(output.read_text().splitlines()) == 4


def test_one_line_means_the_same() -> None:
    value = {"a\u2028\u0085": ["\u2029 \\u2028 é\t", "\n\u2028\u2028"]}
    line = one_line(json.dumps(value, ensure_ascii=False).encode())
    assert json.loads(line) == value and len(line.decode().splitlines()) == 1 and "é".encode() in line
